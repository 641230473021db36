"""Attempts on the machine. Each defines `breach()`, true if it got through; only then is `f` right.

`LOADED` ones act while they are loaded, and then lack nothing but the answer. `{...}` is filled in by the test.
"""

TAIL = """

def f(x):
    try:
        return 2 * x + 1 if breach() else None
    except BaseException:
        return None
"""

# clause -> name -> program
BREACHES: dict[str, dict[str, str]] = {
    "children and daemons": {
        "fork": "import os\ndef breach():\n    pid = os.fork()\n    if pid == 0:\n        os._exit(0)\n    return pid > 0",
        "daemon by double fork": (
            "import os, time\ndef breach():\n    if os.fork() == 0:\n        os.setsid()\n        if os.fork() == 0:\n"
            "            time.sleep(600)\n        os._exit(0)\n    return True"
        ),
        "subprocess": "import subprocess\ndef breach():\n    return subprocess.Popen(['sleep', '600']).pid > 0",
        "multiprocessing": (
            "import multiprocessing, time\ndef breach():\n"
            "    multiprocessing.get_context('fork').Process(target=time.sleep, args=(600,)).start()\n    return True"
        ),
        "posix_spawn": "import os, sys\ndef breach():\n    return os.posix_spawn(sys.executable, ['x'], {}) > 0",
        "exec": "import os, sys\ndef breach():\n    os.execv(sys.executable, ['python', '-c', 'pass'])",
        "clone by system call": (
            "import ctypes\ndef breach():\n    libc = ctypes.CDLL(None)\n    pid = libc.syscall(56, 17, 0, 0, 0, 0)\n"
            "    if pid == 0:\n        libc._exit(0)\n    return pid > 0"
        ),
        "clone3 by system call": (
            "import ctypes, struct\ndef breach():\n    libc = ctypes.CDLL(None)\n"
            "    args = ctypes.create_string_buffer(struct.pack('=8Q', 0, 0, 0, 0, 17, 0, 0, 0))\n"
            "    pid = libc.syscall(435, args, 64)\n    if pid == 0:\n        libc._exit(0)\n    return pid > 0"
        ),
        "vfork by system call": "import ctypes\ndef breach():\n    return ctypes.CDLL(None).syscall(58) >= 0",
    },
    "network": {
        "loopback": (
            "import socket\ndef breach():\n    socket.create_connection(('127.0.0.1', {port}), 1)\n    return True"
        ),
        "datagram": (
            "import socket\ndef breach():\n    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
            "    return s.sendto(b'x', ('127.0.0.1', {port})) == 1"
        ),
        "name service": "import socket\ndef breach():\n    return bool(socket.getaddrinfo('localhost', 80))",
        "listening": (
            "import socket\ndef breach():\n    s = socket.socket()\n    s.bind(('127.0.0.1', 0))\n    s.listen()\n"
            "    return True"
        ),
        "abstract socket": (
            "import socket\ndef breach():\n    s = socket.socket(socket.AF_UNIX)\n    s.connect('\\0{abstract}')\n"
            "    return True"
        ),
        "datagram pair to an abstract socket": (
            "import socket\ndef breach():\n    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
            "    return a.sendto(b'x', '\\0{abstract}') == 1"
        ),
        "netlink": "import socket\ndef breach():\n    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)\n    return True",
        "raw packets": "import socket\ndef breach():\n    socket.socket(socket.AF_PACKET, socket.SOCK_RAW)\n    return True",
        "host sockets": "import socket\ndef breach():\n    socket.socket(40, socket.SOCK_STREAM)\n    return True",
        "asyncio": (
            "import asyncio\nasync def main():\n    await asyncio.open_connection('127.0.0.1', {port})\n    return True\n"
            "def breach():\n    return asyncio.run(main())"
        ),
    },
    "files": {
        "reading accounts": "def breach():\n    return bool(open('/etc/passwd').read())",
        "reading the tests' file": "def breach():\n    return bool(open({secret_file!r}).read())",
        "listing the root": (
            "import os\ndef breach():\n    return bool(set(os.listdir('/')) & set('etc home proc dev tmp work'.split()))"
        ),
        "climbing out": "def breach():\n    return bool(open('../' * 40 + 'etc/passwd').read())",
        "walking out of a chroot": (
            "import os\ndef breach():\n    os.mkdir('jail')\n    os.chroot('jail')\n    os.chdir('../' * 40)\n"
            "    return os.path.exists('etc/passwd')"
        ),
        "writing here": "def breach():\n    return open('x', 'w').write('x') == 1",
        "writing temporary files": (
            "import tempfile\ndef breach():\n    return tempfile.NamedTemporaryFile().write(b'x') == 1"
        ),
        "writing shared memory": "def breach():\n    return open('/dev/shm/mua_x', 'w').write('x') == 1",
        "writing the library": (
            "import os\ndef breach():\n    return open(os.path.join(os.path.dirname(os.__file__), 'mua_x.py'), 'w') and True"
        ),
        "changing the library": "import os\ndef breach():\n    os.chmod(os.__file__, 0o777)\n    return True",
        "removing the library": "import os\ndef breach():\n    os.unlink(os.__file__)\n    return True",
        "linking": "import os\ndef breach():\n    os.symlink('/etc/passwd', 'x')\n    return True",
        "mounting": (
            "import ctypes\ndef breach():\n"
            "    return ctypes.CDLL(None).mount(b'proc', b'/', b'proc', 0, None) == 0"
        ),
        "remounting the library": (
            "import ctypes, os\ndef breach():\n"
            "    return ctypes.CDLL(None).mount(None, os.path.dirname(os.__file__).encode(), None, 4128, None) == 0"
        ),
        "devices": "import os\ndef breach():\n    os.mknod('x', 0o20666, os.makedev(1, 3))\n    return True",
        "open descriptors": (
            "import os\ndef breach():\n    links = []\n    for fd in range(3, 256):\n        try:\n"
            "            if fd != 3 and os.fstat(fd) and not os.fstat(fd).st_mode & 0o140000 == 0o140000:\n"
            "                links.append(fd)\n        except OSError:\n            pass\n    return bool(links)"
        ),
        "opening by handle": (
            "import ctypes\ndef breach():\n    return ctypes.CDLL(None).syscall(304, 3, b'\\0' * 64, 0) >= 0"
        ),
        "temporary file without a name": "import os\ndef breach():\n    return os.open('/', os.O_TMPFILE | os.O_RDWR) > 0",
    },
    "secrets": {
        "environment": "import os\ndef breach():\n    return bool(os.environ)",
        "environment in memory": (
            "import ctypes\ndef breach():\n    libc = ctypes.CDLL(None)\n    libc.getenv.restype = ctypes.c_char_p\n"
            "    return libc.getenv(b'MUA_SECRET') is not None or libc.getenv(b'PATH') is not None"
        ),
        "environment in proc": "def breach():\n    return bool(open('/proc/self/environ').read())",
        "command line": "import sys\ndef breach():\n    return any(sys.argv) or 'mua' in ' '.join(sys.orig_argv[8:9])",
        "memory": (
            "import ctypes\ndef breach():\n    path = open('/proc/self/maps').read()\n    return bool(path)"
        ),
        "what the collector knows": (
            "import gc\ndef breach():\n"
            "    return any(type(o) is dict and 'tests' in o and 'fraction' in o for o in gc.get_objects())"
        ),
        "user name": "import pwd, os\ndef breach():\n    return bool(pwd.getpwuid(os.getuid()).pw_name)",
        "host name": "import os\ndef breach():\n    return bool(open('/etc/hostname').read())",
        "keys of the kernel": "import ctypes\ndef breach():\n    return ctypes.CDLL(None).syscall(250, 0, -3, 1) >= 0",
    },
    "other executions": {
        "signal everybody": "import os\ndef breach():\n    os.kill(-1, 9)\n    return True",
        "signal the parent": "import os\ndef breach():\n    os.kill(os.getppid(), 0)\n    return os.getppid() != 0 or True",
        "stop oneself": "import os, signal\ndef breach():\n    os.kill(os.getpid(), signal.SIGSTOP)\n    return True",
        "trace": "import ctypes\ndef breach():\n    return ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0",
        "read another's memory": (
            "import ctypes\ndef breach():\n    return ctypes.CDLL(None).syscall(310, 1, 0, 0, 0, 0, 0) >= 0"
        ),
        "write a parent's memory": "import os\ndef breach():\n    open(f'/proc/{os.getppid()}/mem', 'r+b')\n    return True",
        "process descriptors": "import os\ndef breach():\n    return os.pidfd_open(1) > 0",
        "another's limits": (
            "import resource\ndef breach():\n    resource.prlimit(1, resource.RLIMIT_CPU, (1, 1))\n    return True"
        ),
        "other namespaces": (
            "import ctypes\ndef breach():\n    return ctypes.CDLL(None).unshare(0x10000000) == 0"
        ),
        "System V memory": "import ctypes\ndef breach():\n    return ctypes.CDLL(None).shmget(7, 4096, 0o1666) >= 0",
        "message queues": "import ctypes\ndef breach():\n    return ctypes.CDLL(None).msgget(7, 0o1666) >= 0",
        "io_uring": (
            "import ctypes\ndef breach():\n    return ctypes.CDLL(None).syscall(425, 8, ctypes.create_string_buffer(120)) >= 0"
        ),
        "becoming root": "import os\ndef breach():\n    os.setuid(0 if os.getuid() else 1)\n    return True",
        "raised limits": (
            "import resource\ndef breach():\n    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))\n    return True"
        ),
        "priority": "import os\ndef breach():\n    return os.nice(-5) is not None",
        "the clock": "import time\ndef breach():\n    time.clock_settime(time.CLOCK_REALTIME, 0)\n    return True",
    },
    "memory, threads, disk": {
        "memory in a list": "def breach():\n    x = [bytearray(1 << 20) for _ in range(4096)]\n    return True",
        "memory in a map": "import mmap\ndef breach():\n    mmap.mmap(-1, 4 << 30)\n    return True",
        "memory in a file": "import os\ndef breach():\n    return os.memfd_create('x') > 0",
        "memory in shared memory": (
            "from multiprocessing import shared_memory\ndef breach():\n"
            "    return bool(shared_memory.SharedMemory(create=True, size=1 << 28))"
        ),
        "threads": (
            "import threading, time\ndef breach():\n    for _ in range(1000):\n"
            "        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n    return True"
        ),
        "descriptors": "import os\ndef breach():\n    x = [os.pipe() for _ in range(1000)]\n    return True",
        "disk": "def breach():\n    with open('/big', 'wb') as file:\n        file.write(bytes(1 << 28))\n    return True",
        "locked memory": (
            "import ctypes\ndef breach():\n    return ctypes.CDLL(None).mlockall(1) == 0"
        ),
        "memory at load": "x = bytearray(1 << 36)\ndef breach():\n    return True",
    },
}
