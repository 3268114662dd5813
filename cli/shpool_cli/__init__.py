"""The shpool command line."""
