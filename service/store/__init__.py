"""The behaviour store.

feature_store (the protocol), codec, memory_store, redis_store, redis_connection, circuit_breaker, local_server.
"""
