"""A Kubernetes API server and its controllers, small and honest, for tests: see `server` and `controller`."""
