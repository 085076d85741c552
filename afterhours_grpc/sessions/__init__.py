"""The domain: what a session is, who may have one, when it ends. No grpc, protobuf, SQL or Redis in here."""
