# What tools/demo and tools/test need of a host. Sourced by both, never run.
# shellcheck shell=bash

# libclang reads the kernel's userfaultfd header for the userfaultfd crate; gcc links, with libc6-dev, which brings that header.
# A script that needs more adds it.
NEEDED_PACKAGES=(gcc libc6-dev libclang-dev)
readonly NEEDED_RUST='1.88'

say() { printf '%s\n' "$*"; }

die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# Prints the packages of NEEDED_PACKAGES that are not installed.
missing_packages() {
    local package
    for package in "${NEEDED_PACKAGES[@]}"; do
        [[ "$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null)" == installed ]] ||
            printf '%s\n' "$package"
    done
}

# Says first what it will install, and installs only what is missing.
install_packages() {
    if ! command -v dpkg-query >/dev/null; then
        say "This is not Debian: see to it yourself that a C compiler, its headers and libclang are there."
        return
    fi
    local -a missing
    mapfile -t missing < <(missing_packages)
    if ((${#missing[@]} == 0)); then
        say "Debian packages: all there (${NEEDED_PACKAGES[*]})."
        return
    fi
    say "Debian packages that will be installed now: ${missing[*]}"
    local -a as_root=()
    if ((EUID != 0)); then
        command -v sudo >/dev/null ||
            die "cannot install them: this is neither root nor is sudo here. As root: apt-get install ${missing[*]}"
        as_root=(sudo)
    fi
    "${as_root[@]}" apt-get update --quiet
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install --yes --quiet --no-install-recommends "${missing[@]}"
}

# Finds cargo, and refuses a Rust that is too old to build this.
find_rust() {
    if ! command -v cargo >/dev/null && [[ -x "${CARGO_HOME:-$HOME/.cargo}/bin/cargo" ]]; then
        PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
    fi
    command -v cargo >/dev/null ||
        die "there is no Rust toolchain. Install one (https://rustup.rs), $NEEDED_RUST or later, and try again"
    local version
    version=$(rustc --version | cut -d' ' -f2)
    [[ "$(printf '%s\n' "$NEEDED_RUST" "$version" | sort --version-sort | head --lines=1)" == "$NEEDED_RUST" ]] ||
        die "Rust $version is too old; $NEEDED_RUST or later is needed: rustup update"
}

# Prints what keeps guests from running and moving here, a line each with what to do; nothing where all is well.
# `switchover check` looks closer; this is for the minutes before it is built.
missing_devices() {
    if [[ ! -e /dev/kvm ]]; then
        say "/dev/kvm is missing. Load the module (sudo modprobe kvm_intel or kvm_amd) and switch virtualisation on in the" \
            "firmware; in a virtual machine its host must pass nested virtualisation on, in a container the device must be" \
            "passed in (--device /dev/kvm)."
    elif [[ ! -r /dev/kvm || ! -w /dev/kvm ]]; then
        say "/dev/kvm is not yours to open. Join the group kvm (sudo usermod -aG kvm \$USER, then log in again), or be root."
    fi
    if ((EUID != 0)) && [[ ! (-r /dev/userfaultfd && -w /dev/userfaultfd) ]] &&
        [[ "$(cat /proc/sys/vm/unprivileged_userfaultfd 2>/dev/null)" != 1 ]]; then
        say "userfaultfd is not permitted. Be root, or be given the device (sudo setfacl -m u:\$USER:rw /dev/userfaultfd," \
            "Linux 6.1 or later), or have it permitted to all (sudo sysctl vm.unprivileged_userfaultfd=1)."
    fi
}
