#!/usr/bin/env bash
# Builds the image of the commit that is checked out, and pushes it. --help says how; docs/docker.md says more.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
    cat <<'TEXT'
usage: ./build_and_push.sh [--artifact-registry IMAGE] [--docker-hub IMAGE] [--latest] [--source URL] [--dry-run]

Builds the image of the commit that is checked out and pushes it with two tags: the version in pyproject.toml, and the
commit's short hash. A working tree with changes is refused, so a tag always says what is in the image.

  --artifact-registry IMAGE  REGION-docker.pkg.dev/PROJECT/REPOSITORY/NAME, of Google Cloud; log in once with:
                             gcloud auth configure-docker REGION-docker.pkg.dev
  --docker-hub IMAGE         ACCOUNT/NAME; log in once with: docker login
  --latest                   push the tag latest as well
  --source URL               where the source can be had, for the image's labels; else the git remote "origin"
  --dry-run                  print every command, run none
  --help                     show this

One of the first two, or both. The variables ARTIFACT_REGISTRY_IMAGE and DOCKER_HUB_IMAGE stand for them where they are
not typed, so that a bare ./build_and_push.sh pushes there. To build without pushing: docker build --tag dylora-moe .
TEXT
}

refuse() { # MESSAGE: one line, and the end
    printf 'build_and_push.sh: %s\n' "$1" >&2
    exit 2
}

artifact_registry=${ARTIFACT_REGISTRY_IMAGE-} docker_hub=${DOCKER_HUB_IMAGE-} source='' latest=false dry_run=false
while (($#)); do
    case $1 in
        --artifact-registry | --docker-hub | --source)
            [[ ${2-} && $2 != -* ]] || refuse "$1 needs a value; see --help"
            case $1 in
                --artifact-registry) artifact_registry=$2 ;;
                --docker-hub) docker_hub=$2 ;;
                --source) source=$2 ;;
            esac
            shift 2
            ;;
        --latest) latest=true && shift ;;
        --dry-run) dry_run=true && shift ;;
        --help) usage && exit ;;
        *) refuse "$1 is not a flag of this command; see --help" ;;
    esac
done

# Names of images are lower case; a tag or digest in one would stand in the way of ours.
part='[a-z0-9]+([._-]+[a-z0-9]+)*'
[[ $artifact_registry || $docker_hub ]] || refuse \
    "nowhere to push to: give --artifact-registry REGION-docker.pkg.dev/PROJECT/REPOSITORY/NAME or --docker-hub ACCOUNT/NAME, or set ARTIFACT_REGISTRY_IMAGE or DOCKER_HUB_IMAGE; see --help"
[[ ! $artifact_registry || $artifact_registry =~ ^[a-z0-9-]+-docker\.pkg\.dev(/$part){3}$ ]] ||
    refuse "--artifact-registry is '$artifact_registry'; it must be REGION-docker.pkg.dev/PROJECT/REPOSITORY/NAME, without a tag"
[[ ! $docker_hub || $docker_hub =~ ^$part/$part$ ]] ||
    refuse "--docker-hub is '$docker_hub'; it must be ACCOUNT/NAME, without a tag"

# The constants of submit_full_training.py are there to be edited, and the file is not in the image.
changes=$(git status --porcelain --untracked-files=all -- . ':!submit_full_training.py') || refuse "this is not a git checkout, so no commit can be named"
[[ ! $changes ]] || refuse "the working tree has changes; commit or remove them first: $(cut -c4- <<<"$changes" | paste -sd ' ')"

version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
[[ $version ]] || refuse "pyproject.toml has no line: version = \"...\""
revision=$(git rev-parse HEAD)
short=$(git rev-parse --short=12 HEAD)
# What stands before an @ may be a password.
source=${source:-$(git remote get-url origin 2>/dev/null | sed 's#//[^/@]*@#//#')} ||
    refuse "there is no git remote \"origin\" to name as the source: give --source URL"

check_docker() { # REGISTRY...: the engine answers, and knows who we are at each registry
    command -v docker >/dev/null || refuse "the command docker is not installed: https://docs.docker.com/engine/install"
    docker version >/dev/null 2>&1 || refuse "docker is installed, but its engine does not answer: see 'docker version'"
    local known=${DOCKER_CONFIG:-$HOME/.docker}/config.json registry
    for registry in "$@"; do
        grep -qsF "\"$registry\"" "$known" && continue
        case $registry in
            *.pkg.dev) refuse "not logged in at $registry: run 'gcloud auth configure-docker $registry'" ;;
            *) refuse "not logged in at Docker Hub: run 'docker login'" ;;
        esac
    done
}

run() { # COMMAND...: say it, so that it can be pasted, and do it unless this is a dry run
    local line
    printf -v line '%q ' "$@"
    printf '%s\n' "${line% }"
    $dry_run || "$@"
}

registries=()
[[ ! $artifact_registry ]] || registries+=("${artifact_registry%%/*}")
[[ ! $docker_hub ]] || registries+=("https://index.docker.io/v1/")
$dry_run || check_docker "${registries[@]}"

names=()
for image in $artifact_registry $docker_hub; do
    names+=("$image:$version" "$image:$short")
    ! $latest || names+=("$image:latest")
done

# The platform of the machines that train, whatever this one is.
build=(docker build --platform linux/amd64)
build+=(--label "org.opencontainers.image.version=$version" --label "org.opencontainers.image.revision=$revision")
build+=(--label "org.opencontainers.image.source=$source" --label "org.opencontainers.image.licenses=Apache-2.0")
run "${build[@]}" "${names[@]/#/--tag=}" .
for name in "${names[@]}"; do
    run docker push "$name"
done
