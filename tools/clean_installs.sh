#!/bin/sh
# Two installations as others make them: the steps of the Dockerfile, and the wheel in an environment that has nothing
# else, which then trains the demo in an empty folder.
#
#     sh tools/clean_installs.sh FOLDER      needs a Python 3.11 to 3.14 (PYTHON names it) and the package index
#
# FOLDER is made, and gets everything: a copy of what the container gets, both environments, the wheel, the demo's runs.
set -eu
mkdir "$1"
folder=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
export PYTHON="${PYTHON:-python3}" TORCH=cpu

echo "the Dockerfile's steps"
image=$folder/image
sed -n 's/^COPY //p' Dockerfile | while read -r copied; do
    target=$image/${copied##* }
    mkdir -p "$target"
    for file in ${copied% *}; do
        if [ -d "$file" ]; then cp -R "$file/." "$target"; else cp "$file" "$target"; fi
    done
done
steps=$(sed -n "s#/opt/venv#$folder/venv#; s#^RUN \(PYTHON=.*\)#\1#p" Dockerfile)
[ -n "$steps" ]
(cd "$image" && PATH="$folder/venv/bin:$PATH" && eval "$steps")

echo "the wheel, in an empty folder"
(cd "$image" && "$folder/venv/bin/python" -m pip wheel . --no-deps --quiet --wheel-dir "$folder")
PACKAGE=$(ls "$folder"/penstock-*.whl) EXTRAS=serve sh tools/setup.sh "$folder/wheel"
mkdir "$folder/empty"
cd "$folder/empty"
"$folder/wheel/bin/python" -c "import penstock; assert penstock.__file__.startswith('$folder/wheel/'), penstock.__file__"
"$folder/wheel/bin/penstock" demo
[ -s runs/demo/report.html ]
ls -l "$folder"/penstock-*.whl
