"""The inspector: look inside a running server.

inspect_routes  POST and GET /v1/inspect/*: attention, logit lens and embeddings
same_origin     refuse requests of other web pages
"""
