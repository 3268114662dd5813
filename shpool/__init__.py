"""One login, every process: a process pool whose workers share one OAuth2 token."""
