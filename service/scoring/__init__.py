"""From a request to its scores.

scorer, model_inputs, feature_merge, candidate_cache, history_cache, row_table, admission, explainer, loaded_model.
"""
