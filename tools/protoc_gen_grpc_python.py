"""A protoc plugin, run by `buf generate`: the grpc_python stubs, which only the bundled protoc of grpcio-tools makes.

It also writes the markers that make the output a typed package. Read https://buf.build/docs/reference/descriptors
for what goes in and out.
"""

import pathlib
import sys
import tempfile

import grpc_tools.protoc
from google.protobuf import descriptor_pb2
from google.protobuf.compiler import plugin_pb2


def generate(request: plugin_pb2.CodeGeneratorRequest) -> plugin_pb2.CodeGeneratorResponse:
    """Answer with `*_pb2_grpc.py` of each file, and the markers of each package."""
    response = plugin_pb2.CodeGeneratorResponse(
        supported_features=plugin_pb2.CodeGeneratorResponse.FEATURE_PROTO3_OPTIONAL
    )
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder, "out")
        out.mkdir()
        descriptors = pathlib.Path(folder, "descriptors.binpb")
        descriptors.write_bytes(descriptor_pb2.FileDescriptorSet(file=request.proto_file).SerializeToString())
        arguments = [f"--descriptor_set_in={descriptors}", f"--grpc_python_out={out}"]
        if grpc_tools.protoc.main(["protoc", *arguments, *request.file_to_generate]):
            response.error = "grpc_tools.protoc failed"
            return response
        for path in sorted(out.rglob("*.py")):
            response.file.add(name=str(path.relative_to(out)), content=path.read_text())
    folders = {parent for name in request.file_to_generate for parent in pathlib.PurePath(name).parents}
    for package in sorted(folders - {pathlib.PurePath()}):
        response.file.add(name=str(package / "__init__.py"), content="")
        if len(package.parts) == 1:
            response.file.add(name=str(package / "py.typed"), content="")
    return response


if __name__ == "__main__":
    answer = generate(plugin_pb2.CodeGeneratorRequest.FromString(sys.stdin.buffer.read()))
    sys.stdout.buffer.write(answer.SerializeToString())
