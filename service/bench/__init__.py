"""`python -m service bench`: an open loop of requests, and how the service stands it."""
