"""Threads, multiprocessing, subprocess and fork in a program."""

from __future__ import annotations

import os

import pytest

POOL = """
    import multiprocessing as mp, os, sys
    from concurrent.futures import ProcessPoolExecutor
    def square(n): return n * n
    def put(queue, n): queue.put(n + 1)
    def add(value, lock):
        for _ in range(100):
            with lock: value.value += 1
    if __name__ == "__main__":
        mp.set_start_method(sys.argv[1])
        with mp.Pool(2) as pool:
            print(pool.map(square, range(5)))
        queue = mp.Queue(); p = mp.Process(target=put, args=(queue, 1)); p.start()
        print(queue.get(), p.join(), p.exitcode)
        value, lock = mp.Value("i", 0), mp.Lock()
        ps = [mp.Process(target=add, args=(value, lock)) for _ in range(2)]
        [p.start() for p in ps]; [p.join() for p in ps]; print(value.value)
        p = mp.Process(target=sys.exit, args=(3,)); p.start(); p.join(); print(p.exitcode)
        p = mp.Process(target=os.abort); p.start(); p.join(); print(p.exitcode)
        with ProcessPoolExecutor(2) as executor: print(list(executor.map(square, [3, 4])))
        print(mp.current_process().name, mp.parent_process(), mp.active_children(), os.path.exists("/dev/shm"))
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(both, method):
    both.same_program(POOL, method)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing_of_a_module_run_by_m(both, method):
    both.write("package/__init__.py", "")
    both.write("package/app.py", POOL)
    both.same("-m", "package.app", method)


def test_spawn_without_the_guard_fails_as_always(both):
    both.same_program(
        "import multiprocessing as mp\nmp.set_start_method('spawn')\np = mp.Process(target=print)\n"
        "p.start(); p.join()\nprint(p.exitcode)",
        mask=(rb"(?s:Traceback.*)",),
    )


def test_shared_memory(both):
    both.same_program("""
        import multiprocessing as mp, sys
        from multiprocessing import shared_memory
        def fill(name):
            s = shared_memory.SharedMemory(name=name); s.buf[:5] = b"hello"; s.close()
        if __name__ == "__main__":
            for method in ("fork", "spawn"):
                s = shared_memory.SharedMemory(create=True, size=1 << 20)
                p = mp.get_context(method).Process(target=fill, args=(s.name,)); p.start(); p.join()
                print(bytes(s.buf[:5]), p.exitcode); s.close(); s.unlink()
            l = shared_memory.ShareableList([1, "a"]); print(list(l)); l.shm.close(); l.shm.unlink()
    """)


def test_a_manager(both):
    both.same_program("""
        import multiprocessing as mp
        if __name__ == "__main__":
            with mp.Manager() as m:
                d = m.dict(); p = mp.Process(target=d.update, args=({"a": 1},)); p.start(); p.join(); print(dict(d))
    """)


def test_subprocess(both):
    both.same_program("""
        import os, subprocess, sys
        print(subprocess.run(["echo", "a b"], capture_output=True).stdout)
        print(subprocess.run([sys.executable, "-c", "import sys; print(sys.argv, sys.path); sys.exit(3)", "x"],
                             capture_output=True, text=True))
        print(subprocess.run("cat; exit 4", shell=True, input=b"in", stdout=subprocess.PIPE))
        print(os.system("exit 5"), os.popen("echo popen").read(), subprocess.getoutput("pwd") == os.getcwd())
        p = subprocess.Popen(["sleep", "1000"]); p.terminate(); print(p.wait())
        print(subprocess.run(["sh", "-c", "kill -PIPE $$"]).returncode, subprocess.run("trap", shell=True).returncode)
        print(subprocess.run([sys.executable, "-m", "json.tool"], input=b"[1]", stdout=subprocess.PIPE).stdout)
        sys.stdout.flush(); subprocess.run(["sh", "-c", "echo direct; echo error >&2; ls /proc/self/fd | wc -l"])
        try: subprocess.run(["/no/such/program"])
        except FileNotFoundError as e: print(e)
    """)


def test_fork(both):
    both.same_program("""
        import os, sys, threading, time
        print("before", flush=True)
        pid = os.fork()
        if pid == 0:
            print("child", threading.active_count(), os.getppid() > 1); sys.exit(6)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), os.getpgid(0) == os.getpid() or True)
        r, w = os.pipe()
        if os.fork() == 0:
            os.close(r); os.write(w, b"x" * 10); os._exit(0)
        os.close(w); print(os.read(r, 100), os.wait()[1])
        if os.fork() == 0: os.execvp("echo", ["echo", "exec"])
        os.wait(); print(os.posix_spawnp("true", ["true"], os.environ) > 0, os.wait()[1])
        os.register_at_fork(after_in_child=lambda: print("hook", flush=True))
        if os.fork() == 0: os._exit(0)
        os.wait()
    """)


def test_fork_after_threads(both):
    both.same_program("""
        import os, threading
        t = threading.Thread(target=threading.Event().wait, daemon=True); t.start()
        if os.fork() == 0:
            print(threading.active_count(), flush=True); os._exit(3)
        print(os.wait()[1], threading.active_count())
    """)


def test_exec_of_the_program_itself(both):
    both.same_program("""
        import os, sys
        if len(sys.argv) > 1:
            print("again", sys.argv); sys.exit(4)
        print("first", flush=True)
        os.execv(sys.executable, [sys.executable, *sys.argv, "x"])
    """)


def test_many_threads(both):
    both.same_program("""
        import threading, queue
        from concurrent.futures import ThreadPoolExecutor
        with ThreadPoolExecutor(32) as e: print(sum(e.map(lambda n: n, range(1000))))
        done = queue.Queue()
        ts = [threading.Thread(target=done.put, args=(n,), name=f"mine-{n}") for n in range(100)]
        [t.start() for t in ts]; [t.join() for t in ts]; print(sorted(done.queue) == list(range(100)))
        local = threading.local(); local.x = 1; print(local.x, threading.stack_size())
    """)


def test_asyncio(both):
    both.same_program("""
        import asyncio, sys
        async def main():
            p = await asyncio.create_subprocess_exec(sys.executable, "-c", "print(1)", stdout=asyncio.subprocess.PIPE)
            print(await p.communicate(), p.returncode)
            await asyncio.sleep(0.01)
            print(await asyncio.to_thread(len, "abc"))
            server = await asyncio.start_unix_server(lambda r, w: (w.write(b"hi"), w.close()), "socket")
            r, w = await asyncio.open_unix_connection("socket"); print(await r.read()); server.close()
        asyncio.run(main())
    """)


def test_an_orphan_is_reaped_and_its_pid_namespace_is_small(both):
    program = "import os; print(os.getpid(), os.getppid(), sorted(p for p in os.listdir('/proc') if p.isdigit()))"
    assert both.pocket("-c", program).out == b"2 0 ['1', '2']\n"


def test_the_program_sees_its_own_command_line(both):
    """As ps shows it, and as psutil and the like find themselves."""
    both.write("app.py", "import sys; print(open('/proc/self/cmdline', 'rb').read(), sys.argv)")
    both.same("app.py", "a", "", "b" * 5000)


def test_signals_and_timers_of_its_own(both):
    both.same_program("""
        import os, signal, threading, time
        hits = []
        signal.signal(signal.SIGALRM, lambda *a: hits.append(1))
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
        while len(hits) < 3: time.sleep(1)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1]); os.kill(os.getpid(), signal.SIGUSR1)
        print(len(hits) >= 3, signal.sigpending(), signal.sigwait([signal.SIGUSR1]))
        threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()
        try: time.sleep(100)
        except KeyboardInterrupt: print("interrupted")
        signal.signal(signal.SIGCHLD, lambda *a: print("child"))
        if os.fork() == 0: os._exit(0)
        os.wait(); time.sleep(0)
    """)


def test_random_numbers_of_two_runs_differ(both):
    program = """
        import os, random, secrets, ssl, tempfile, uuid
        for value in (random.random(), secrets.token_hex(), ssl.RAND_bytes(8), uuid.uuid4(), uuid.uuid1()): print(value)
        print(os.urandom(8)); print(next(tempfile._get_candidate_names()))
    """
    both.write("app.py", program)
    runs = [both.pocket("app.py").out.splitlines() for _ in range(4)]
    assert len(runs[0]) == 7
    for values in zip(*runs, strict=True):
        assert len(set(values)) == 4, values


def test_files_that_the_program_makes_are_the_owners(both):
    os.chown(both.place, 12345, 23456)
    both.write(
        "app.py",
        "import os; open('made', 'w').write('x'); os.mkdir('folder'); os.symlink('a', 'link')\n"
        "print(os.stat('.').st_uid == os.getuid())",
    )
    ended = both.pocket("app.py")
    if ended.out == b"False\n":
        pytest.skip("this file system does not map ids")
    assert ended.status == 0, ended.shown()
    for name in ("made", "folder", "link"):
        status = os.lstat(both.place / name)
        assert (status.st_uid, status.st_gid) == (12345, 23456)
