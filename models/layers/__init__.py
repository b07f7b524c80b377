"""What several models share.

base, embeddings, attention, mlp, target_attention, request_matmul, split_linear, folding, intermediates,
initialisation, config.
"""
