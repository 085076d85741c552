#!/bin/sh
# Makes the TypeScript of the protos in the folder $1, by protoc-gen-es. Beside ours, what the details of errors are:
# google.rpc's, as Python's package brings it. Where there is no npm it says so, and has status 3.
set -eu
command -v npm >/dev/null || { echo "there is no npm: generated/typescript is left alone" >&2; exit 3; }
npm --prefix clients/typescript ci --silent --no-audit --no-fund
rpc=$(mktemp -d)
trap 'rm -r "$rpc"' EXIT
mkdir -p "$rpc/google/rpc"
details=$(.venv/bin/python -c 'import google.rpc.error_details_pb2 as it; print(it.__file__.replace("_pb2.py", ".proto"))')
cp "$details" "$rpc/google/rpc"
for each in protos "$rpc"; do
    .venv/bin/buf generate "$each" --template '{"version": "v2", "plugins": [{
        "local": "clients/typescript/node_modules/.bin/protoc-gen-es",
        "out": "'"$1"'",
        "opt": ["target=js+dts", "import_extension=js"]
    }]}'
done
