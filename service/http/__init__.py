"""The HTTP edge: routes, schemas, decoding, problems, openapi, protocol, middleware, admin, open_inference, tensors."""
