#!/usr/bin/env bash
# Makes FOLDER hold the fake driver under the names of the real libraries:
#
#   gds/fake-driver/lay-out.sh FOLDER [LIBRARY]
#   LD_LIBRARY_PATH=FOLDER python3 …
#
# LIBRARY is libpinion_gds_fake_driver.so; without it, the one of the last
# `cargo build --release -p pinion-gds-fake-driver`.
set -euo pipefail
folder=${1:?usage: lay-out.sh FOLDER [LIBRARY]}
here=$(cd "$(dirname "$0")" && pwd)
target=${CARGO_TARGET_DIR:-$here/../../target}
library=$(realpath "${2:-$target/release/libpinion_gds_fake_driver.so}")
[ -f "$library" ] || { echo "no such library: $library" >&2; exit 1; }
mkdir -p "$folder"
for name in libcuda.so libcuda.so.1 libcufile.so libcufile.so.0; do
    ln -sfn "$library" "$folder/$name"
done
