"""lesionflow: honest, leak-proof skin-lesion triage models, from laptop to Kubeflow.

Not a medical device.
"""

__version__ = "0.1.0"
