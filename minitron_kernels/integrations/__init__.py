"""The kernels inside other runtimes, a module each; `docs/integrations.md` has the table."""
