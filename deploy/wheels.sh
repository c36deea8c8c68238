# Wheels for the test VM, which has no network: pocketd and what it needs in .cache/vm/wheels, and in .cache/vm/next the
# same tree as if it were the next version, with the next version of the protocol, for an upgrade. Read by deploy/prepare.

own_files() { find setup.py README.md pocketd nsutil cgroup runtime -name '*.py' -o -name '*.[ch]' | sort; }

build_wheels() {
    stamps=$here/.cache/vm/.stamps
    # shellcheck disable=SC2046
    step wheels "$(digest deploy/wheels.sh $requirements/constraints.txt setup.py)" make_wheels
    # shellcheck disable=SC2046
    step own-wheel "$(digest $(own_files))" make_own_wheels
}
wheel() {
    rm -rf build/lib build/bdist* # what was deleted since would be in it

    "$venv/bin/python" -m pip wheel --disable-pip-version-check --no-input --quiet "$@" >>"$log" 2>&1 </dev/null ||
        fail_with_log "pip could not make the wheels for the test VM"
}
make_wheels() {
    say "making wheels for the test VM"
    rm -rf -- .cache/vm/wheels
    wheel -c $requirements/constraints.txt -w .cache/vm/wheels .
}
make_own_wheels() {
    local copy=$here/.cache/vm/source
    wheel --no-deps -w .cache/vm/wheels .
    rm -rf -- "$copy" .cache/vm/next
    mkdir -p "$copy"
    # shellcheck disable=SC2046
    tar -c $(own_files) | tar -x -C "$copy"
    sed -i 's/version="0.1.0"/version="0.2.0"/' "$copy/setup.py"
    sed -i 's/__version__ = "0.1.0"/__version__ = "0.2.0"/' "$copy/pocketd/__init__.py"
    sed -i 's/^VERSION = 1$/VERSION = 2/' "$copy/pocketd/wire.py"
    wheel --no-deps -w .cache/vm/next "$copy"
    rm -rf -- "$copy"
}
