"""The wire: what knows grpc and protobuf, and nothing else does."""
