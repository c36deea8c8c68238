# What the test VM is made of, fetched into .cache/vm/: an emulator, the daemon that shows it the host's files, and two
# kernels. All of it is unpacked and nothing installed, so that the host's own packages stay as they are. Read by
# deploy/prepare.
#
# The emulator is the backports': QEMU 7.2 without KVM oopses guests of kernel 6.12. The daemon is the release's, since
# QEMU 8 dropped the C virtiofsd and Debian 12 has no other.

vm=$here/.cache/vm
vm_apt=$vm/apt

vm_check_host() {
    [ "$(uname -m)" = x86_64 ] || fail "the test VM is for x86-64; this machine is $(uname -m)" "without it: make test VM=skip"
    command -v apt-get >/dev/null || fail "no apt-get, which the test VM is fetched with" "without it: make test VM=skip"
}

# Repositories come from the host's own sources, whatever their format: the same mirror has the backports.
vm_sources() {
    local suite
    suite=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    [ "$suite" = bookworm ] || fail "the test VM is made of Debian 12's packages; this is ${suite:-not Debian}" \
        "without it: make test VM=skip"
    apt-get indextargets --no-release-info --format '$(REPO_URI) $(RELEASE) $(COMPONENT) $(CREATED_BY)' |
        awk -v suite="$suite" '
            $3 != "main" || $4 != "Packages" { next }
            $2 == suite && !seen[$1, $2]++ { print "deb", $1, suite, "main"; print "deb", $1, suite "-backports", "main" }
            $2 == suite "-security" && !seen[$1, $2]++ { print "deb", $1, $2, "main" }'
}

# vm_get COMMAND [ARGUMENT...]: apt-get or apt-cache with lists, cache and dpkg status of its own.
vm_get() {
    local command=$1
    shift
    "$command" -o Dir::Etc::sourcelist="$vm_apt/sources.list" -o Dir::Etc::sourceparts=- \
        -o Dir::State="$vm_apt/state" -o Dir::State::status="$vm_apt/status" -o Dir::Cache="$vm_apt/cache" \
        -o APT::Sandbox::User=root -o Acquire::Languages=none "$@"
}

# vm_unpack DIRECTORY PACKAGE...: as PACKAGE, or PACKAGE/SUITE
vm_unpack() {
    local to=$1 archive
    shift
    rm -rf -- "$vm_apt/got" "$to"
    mkdir -p "$vm_apt/got" "$to"
    (cd "$vm_apt/got" && vm_get apt-get download "$@") >>"$log" 2>&1 || fail_with_log "apt-get could not download: $*"
    for archive in "$vm_apt/got"/*.deb; do dpkg-deb -x "$archive" "$to"; done
}

# vm_newest_kernel PATTERN: the name of the newest package that matches.
vm_newest_kernel() { vm_get apt-cache pkgnames linux-image- | { grep -E "^linux-image-$1-cloud-amd64\$" || true; } | sort -V | tail -n 1; }

# vm_unpack_kernel DIRECTORY PACKAGE: with the index of modules that the package's own installation would make.
vm_unpack_kernel() {
    [ -n "$2" ] || fail "the mirror has no cloud kernel for ${1##*/}"
    vm_unpack "$1" "$2"
    depmod -b "$1" "$(basename "$1"/lib/modules/*)" >>"$log" 2>&1 || fail_with_log "depmod failed for $2"
}

fetch_vm() {
    local packages newest
    say "fetching QEMU and two kernels for the test VM (some 75 MB, once)"
    rm -rf -- "$vm_apt"
    mkdir -p "$vm_apt"/{state,cache/archives}/ "$vm_apt/state/lists/partial" "$vm_apt/cache/archives/partial"
    vm_sources >"$vm_apt/sources.list"
    [ -s "$vm_apt/sources.list" ] || fail "the host's apt sources have no main component of Debian 12"
    # With the host's QEMU left out of what is installed, apt names all that is needed, and libraries the host lacks.
    awk 'BEGIN { RS = ""; ORS = "\n\n" } !/^Package: (qemu-|seabios|ipxe-qemu)/' /var/lib/dpkg/status >"$vm_apt/status"
    vm_get apt-get update >>"$log" 2>&1 || fail_with_log "apt-get update failed for the test VM's sources"
    packages=$(vm_get apt-get -s -y --no-install-recommends -t bookworm-backports install \
        qemu-system-x86 libseccomp2 libcap-ng0 2>>"$log" | awk '/^Inst/ { print $2 }')
    [ -n "$packages" ] || fail_with_log "the mirror's backports have no qemu-system-x86 that can be had"
    # shellcheck disable=SC2086
    vm_unpack "$vm/qemu" -t bookworm-backports $packages
    vm_unpack "$vm/virtiofsd" qemu-system-common/bookworm
    newest=$(vm_newest_kernel '6\.12\.[0-9].*')
    [ -n "$newest" ] || newest=$(vm_newest_kernel '(6\.(1[3-9]|[2-9][0-9])|[7-9]|[1-9][0-9]).*')
    vm_unpack_kernel "$vm/kernel-newest" "$newest"
    vm_unpack_kernel "$vm/kernel-6.1" "$(vm_newest_kernel '6\.1\.[0-9].*')"
    rm -rf -- "$vm_apt"
}

build_vm() {
    stamps=$vm/.stamps
    step fetched "$(digest deploy/vm.sh)" fetch_vm
}
