# Sourced by tests/run, bench/run and ./demo: what must be on the machine, and how to get what is missing.
#
# Needs bash and a Rust toolchain (rustup). The rest is installed with apt-get where that exists and we are root
# or may sudo; otherwise the missing command is named and we stop. Nothing is installed that is already there.

cache=${PINION_CACHE:-$HOME/.cache/pinion}
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$cache/target}
mkdir -p "$cache"

fail() {
  echo "error: $*" >&2
  exit 1
}

# need COMMAND PACKAGE...: makes sure that COMMAND can be run.
need() {
  local command=$1
  shift
  command -v "$command" >/dev/null && return
  install "$command" "$@"
  command -v "$command" >/dev/null || fail "$command is still missing after installing: $*"
}

install() {
  local what=$1 sudo=
  shift
  command -v apt-get >/dev/null || fail "$what is missing: install it (Debian calls it: $*)"
  if [[ $(id -u) != 0 ]]; then
    command -v sudo >/dev/null || fail "$what is missing: as root, apt-get install $*"
    sudo=sudo
  fi
  echo "installing $*: $what is missing" >&2
  $sudo apt-get update -qq >&2
  $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >&2
}

need_build_tools() {
  # A fresh rustup is on the PATH only of later shells.
  [[ -f $HOME/.cargo/env ]] && . "$HOME/.cargo/env"
  command -v cargo >/dev/null || fail "cargo is missing: install Rust 1.90 or newer with rustup, then run this again"
  need gcc gcc libc6-dev
  need g++ g++
  need make make
  # librdkafka's TLS and SCRAM.
  need pkg-config pkg-config libssl-dev
  pkg-config --exists openssl || install OpenSSL libssl-dev
}

# need_python REQUIREMENTS [NAME]: the Python of the tests, or of something else: a venv with exactly the pinned
# packages, in $cache/NAME.
need_python() {
  local requirements=$1 stamp
  need python3 python3 python3-venv
  venv=$cache/${2:-venv}
  stamp=$venv/.installed-$(sha256sum "$requirements" | cut -c1-16)
  if [[ ! -f $stamp ]]; then
    python3 -c 'import ensurepip' 2>/dev/null || install ensurepip python3-venv
    [[ -x $venv/bin/python ]] || python3 -m venv "$venv"
    "$venv/bin/python" -m pip install -q --disable-pip-version-check -r "$requirements" >&2
    rm -f "$venv"/.installed-*
    touch "$stamp"
  fi
}

need_kafka() {
  need java default-jre-headless
  [[ -n $("$1/kafka/broker" jars 2>/dev/null) ]] && return
  need mvn maven
  "$1/kafka/broker" jars >/dev/null
}

# The Flight clients of other languages. Go is not installed: the one of the distribution is mostly too old, and the tests
# of a missing language are skipped with the reason.
need_clients() {
  need javac default-jdk-headless
  need mvn maven
  "$1/clients/build" java >/dev/null
  "$1/clients/build" go >/dev/null || (($? == 3))
}
