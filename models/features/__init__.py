"""From raw values to arrays.

values, field, schema, fitting, column_encoding, history, request, arrays, encoder. No torch.
"""
