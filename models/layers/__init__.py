"""What several models share.

base, embeddings, attention, mlp, target_attention, request_matmul, intermediates, initialisation, config.
"""
