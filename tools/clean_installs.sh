#!/bin/sh
# Two installations of the last commit as others make them: the steps of the Dockerfile, and the wheel in an environment
# that has nothing else, which then trains the demo in an empty folder.
#
#     sh tools/clean_installs.sh FOLDER      needs a Python 3.11 to 3.14 (PYTHON names it) and the package index
#
# FOLDER is made, and gets everything: what the container gets, both environments, the wheel, the demo's runs.
set -eu
mkdir "$1"
folder=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
unset PYTHONPATH
export PYTHON="${PYTHON:-python3}" TORCH=cpu venv="$folder/venv"

echo "the Dockerfile's steps"
mkdir "$folder/image"
copied=$(sed -n 's/^COPY \(.*\) [^ ]*$/\1/p' Dockerfile)
# shellcheck disable=SC2086
git archive HEAD $copied | tar -x -C "$folder/image"
steps=$(sed -n 's#/opt/venv#"$venv"#; s#^RUN PYTHON=python3 \(.*\)#\1#p' Dockerfile)
[ -n "$steps" ]
(cd "$folder/image" && PATH="$venv/bin:$PATH" && eval "$steps")

echo "the wheel, in an empty folder"
(cd "$folder/image" && "$venv/bin/python" -m pip wheel . --no-deps --quiet --wheel-dir "$folder")
PACKAGE=$(ls "$folder"/penstock-*.whl) EXTRAS=serve sh tools/setup.sh "$folder/wheel"
mkdir "$folder/empty"
cd "$folder/empty"
[ "$("$folder/wheel/bin/python" -c "import penstock; print(penstock.__file__)" | cut -c "-${#folder}")" = "$folder" ]
"$folder/wheel/bin/penstock" demo
[ -s runs/demo/report.html ]
ls -l "$folder"/penstock-*.whl
