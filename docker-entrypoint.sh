#!/bin/bash
# The image's entry point, behind tini: commands and flags of dylora go to dylora, other programs run as they are.
case ${1-} in
    -* | train | stream | submit | plan | data | experts | eval | compare | generate | export | report) exec dylora "$@" ;;
esac
# Only files on the PATH count: shells also call `eval` and `export` commands. All else is for dylora, which says what it
# does not know.
if [[ $(type -P -- "${1-}") ]]; then
    exec "$@"
fi
exec dylora "$@"
