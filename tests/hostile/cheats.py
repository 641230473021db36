"""Programs that do not solve the row (`f(x) == 2 * x + 1`, or as `ROWS` says) and try to be taken for right."""

ROWS: dict[str, str] = {
    "f": "assert f(3) == 7\nassert f(0) == 1\nassert f(-4) == -7",
    "near": "assert abs(f(3) - 7.5) < 1e-6\nassert f(1) != f(2)",
    "member": "assert 7 in f(3)\nassert not isinstance(f(3), str)",
    "items": "assert sorted(f([3, 1, 2])) == [1, 2, 3]\nassert len(f([1])) == 1",
    "loop": "for got, want in zip(map(f, [1, 2, 3]), [3, 5, 7]):\n    assert got == want\nassert len(list(map(f, [1]))) == 1",
    "all": "assert all(map(lambda x: f(x) == 2 * x + 1, range(9)))",
    "unittest": (
        "import unittest\nclass T(unittest.TestCase):\n    def test_it(self):\n        self.assertEqual(f(3), 7)\n"
        "    def test_bad(self):\n        with self.assertRaises(Exception):\n            f('x')"
    ),
    "raises": "try:\n    f('x')\n    assert False\nexcept Exception:\n    pass\nassert f(1) == 3",
    "check": "def check(candidate):\n    assert candidate(3) == 7\n    assert candidate(1) == 3",
    "class": "s = Stack()\ns.push(1)\ns.push(2)\nassert s.pop() == 2\nassert s.size() == 1",
    "truth": "assert f(1)\nassert not f(2)",
    "callback": "seen = []\nassert f(lambda v: seen.append(v) or v) == 7\nassert seen == [1, 2]",
    "mutated": "xs = [3, 1, 2]\nf(xs)\nassert xs == [1, 2, 3]",
}

# clause -> name -> (row, program)
CHEATS: dict[str, dict[str, tuple[str, str]]] = {
    "exiting": {
        "at load": ("f", "import os\nos._exit(0)"),
        "by sys.exit": ("f", "import sys\ndef f(x):\n    sys.exit(0)"),
        "by SystemExit at load": ("f", "raise SystemExit(0)"),
        "in a call": ("f", "import os\ndef f(x):\n    os._exit(0)"),
        "in a call that should fail": ("raises", "import os\ndef f(x):\n    os._exit(0)"),
        "in a thread": (
            "f",
            "import os, threading, time\nthreading.Timer(0.05, lambda: os._exit(0)).start()\n"
            "def f(x):\n    time.sleep(9)",
        ),
        "by a signal": ("f", "import ctypes\ndef f(x):\n    ctypes.string_at(0)"),
        "by abort": ("unittest", "import os\ndef f(x):\n    os.abort()"),
        "by interrupt": ("f", "def f(x):\n    raise KeyboardInterrupt"),
        "by generator exit": ("all", "def f(x):\n    raise GeneratorExit"),
        "by a skip": ("unittest", "import unittest\ndef f(x):\n    raise unittest.SkipTest('x')"),
        "by an end of iteration in a loop": ("loop", "def f(x):\n    raise StopIteration"),
        "by an end of iteration in all": ("all", "def f(x):\n    raise StopIteration"),
        "by an own end of iteration": ("all", "class E(StopIteration): pass\ndef f(x):\n    raise E"),
        "by an asynchronous end of iteration": ("loop", "def f(x):\n    raise StopAsyncIteration"),
        "by recursion": ("f", "def f(x):\n    return f(x)"),
        "with open channel closed": ("raises", "import os\ndef f(x):\n    os.closerange(0, 64)"),
        "at exit": ("f", "import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit"),
    },
    "answers equal to everything": {
        "object": ("f", "class A:\n    def __eq__(s, o): return True\ndef f(x): return A()"),
        "object on the right": (
            "f",
            "class A(int):\n    def __eq__(s, o): return True\n    def __ne__(s, o): return False\n    __hash__ = None\n"
            "def f(x): return A(1)",
        ),
        "text": ("f", "class A(str):\n    def __eq__(s, o): return True\ndef f(x): return A('x')"),
        "list": (
            "items",
            "class A(list):\n    def __eq__(s, o): return True\n    def __len__(s): return 1\n"
            "    def __iter__(s): return iter([])\ndef f(x): return A()",
        ),
        "mock.ANY": ("f", "from unittest.mock import ANY\ndef f(x): return ANY"),
        "mock": ("f", "from unittest.mock import MagicMock\nf = MagicMock(return_value=MagicMock(__eq__=lambda s, o: True))"),
        "metaclass": ("f", "class M(type):\n    def __eq__(s, o): return True\n    __hash__ = None\nclass A(metaclass=M): pass\ndef f(x): return A"),
        "not implemented": ("f", "def f(x): return NotImplemented"),
        "difference of zero": (
            "near",
            "class A:\n    def __sub__(s, o): return 0.0\n    __rsub__ = __sub__\n    def __abs__(s): return 0.0\n"
            "    def __ne__(s, o): return True\ndef f(x): return A()",
        ),
        "less than everything": (
            "near",
            "class A(float):\n    def __lt__(s, o): return True\n    def __sub__(s, o): return s\n    def __abs__(s): return s\n"
            "    def __ne__(s, o): return True\ndef f(x): return A(1)",
        ),
        "holding everything": ("member", "class A:\n    def __contains__(s, o): return True\ndef f(x): return A()"),
        "iterating over everything": (
            "member",
            "import itertools\nclass A:\n    def __iter__(s): return itertools.count()\ndef f(x): return A()",
        ),
        "holding items equal to everything": (
            "member",
            "class E:\n    def __eq__(s, o): return True\ndef f(x): return [E()]",
        ),
        "sorting at will": (
            "items",
            "class E:\n    def __eq__(s, o): return True\n    def __lt__(s, o): return True\ndef f(x): return [E() for _ in x]",
        ),
        "changing truth": (
            "f",
            "class A:\n    n = 0\n    def __bool__(s):\n        A.n += 1\n        return A.n % 2 == 1\n    def __eq__(s, o): return s\n"
            "def f(x): return A()",
        ),
        "not a truth": ("truth", "class A:\n    def __bool__(s): return 5\ndef f(x): return A()"),
        "class of another": ("f", "class A:\n    __class__ = int\n    def __eq__(s, o): return True\ndef f(x): return A()"),
        "whatever attribute": ("class", "class Stack:\n    def __getattr__(s, n): return lambda *a: s\n    def __eq__(s, o): return True"),
        "not a number": ("f", "def f(x): return float('nan')"),
        "hash of another": ("f", "class A:\n    def __hash__(s): return hash(7)\n    def __eq__(s, o): return True\ndef f(x): return A()"),
    },
    "touching tests and grader": {
        "own assertion error": ("f", "import builtins\nclass AssertionError(Exception): pass\nbuiltins.AssertionError = AssertionError\ndef f(x): return 0"),
        "own builtins": (
            "all",
            "import builtins\nbuiltins.all = lambda *a: True\nall = map = abs = lambda *a: True\ndef f(x): return 0",
        ),
        "own check": ("check", "def check(candidate): pass\ndef candidate(x): return 7\ndef f(x): return 0"),
        "stack frames": (
            "f",
            "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n        for d in (frame.f_locals, frame.f_globals):\n"
            "            for k, v in list(d.items()):\n                if isinstance(v, str) and 'assert' in v: return 2 * x + 1\n"
            "        frame = frame.f_back",
        ),
        "patched codec": (
            "f",
            "import sys\nfor name in list(sys.modules):\n    if name.startswith('sandbox'):\n        m = sys.modules[name]\n"
            "        for k in dir(m):\n            if k in ('encode', 'pack'): setattr(m, k, lambda *a: True)\ndef f(x): return 0",
        ),
        "patched tester": (
            "f",
            "import sys\ntry:\n    sys.modules['sandbox.tester']._Report.bad = lambda *a: None\nexcept BaseException: pass\n"
            "def f(x): return 0",
        ),
        "forged report": (
            "f",
            "import os\ndef f(x):\n    for fd in range(0, 30):\n        try: os.write(fd, b'[\"ok\"]\\n[\"ok\"]\\n[\"ok\"]\\n[\"end\"]\\n[\"reuse\"]\\n')\n"
            "        except OSError: pass",
        ),
        "forged answer": (
            "f",
            "import os, json\ndef f(x):\n    for m in (['ok'], ['end'], ['r', True, None], ['stop']):\n        d = json.dumps(m).encode()\n"
            "        os.write(3, len(d).to_bytes(4, 'big') + d)\n        os.write(4, len(d).to_bytes(4, 'big') + d)",
        ),
        "answers in advance": (
            "raises",
            "import os, json\nd = json.dumps(['x', 'ValueError', [], None]).encode()\n"
            "for fd in (3, 4):\n    try: os.write(fd, (len(d).to_bytes(4, 'big') + d) * 9)\n    except OSError: pass\n"
            "def f(x): raise ValueError",
        ),
        "printing": ("f", "print('PASSED', 'OK', '1 passed')\ndef f(x):\n    print('ok', flush=True)"),
        "forged callback": (
            "f",
            "import os, json\ndef f(x):\n    for n in (0, -1, 10 ** 9, 'x', None):\n        d = json.dumps(['k', n, [[[], {'d': []}], []]]).encode()\n"
            "        os.write(4, len(d).to_bytes(4, 'big') + d)",
        ),
        "callback abused": ("callback", "def f(g):\n    for name in ('__globals__', '__closure__', '__self__'):\n        getattr(g, name, None)\n    g.__globals__['seen'] = [1, 2]\n    return 7"),
        "callback called at will": ("callback", "def f(g):\n    for i in range(5): g(i)\n    return 7"),
        "unknown object": (
            "f",
            "import os, json\ndef f(x):\n    d = json.dumps(['r', [{'o': 0}, [['int', {'d': []}]]], None]).encode()\n    os.write(4, len(d).to_bytes(4, 'big') + d)",
        ),
        "not JSON": ("raises", "import os\ndef f(x): os.write(4, b'\\0\\0\\0\\5hello')"),
        "changed module": ("f", "import sys\nsys.modules['tests'] = sys.modules[__name__]\nsys.modules['__main__'] = None\ndef f(x): return 0"),
        "name of a builtin": ("items", "sorted = len = lambda *a: [1, 2, 3]\ndef f(x): return 0"),
        "argument as expected value": ("mutated", "def f(xs):\n    class L(list):\n        def __eq__(s, o): return True\n    xs[:] = [L()]"),
        "tracing": ("f", "import sys\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)\nsys.addaudithook(lambda *a: None)\ndef f(x): return 0"),
    },
    "time": {
        "endless loop": ("f", "def f(x):\n    while True: pass"),
        "endless loop at load": ("f", "while True: pass"),
        "sleep": ("f", "import time\ndef f(x): time.sleep(1e6)"),
        "deaf to signals": (
            "f",
            "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
            "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\ndef f(x):\n    while True:\n        try:\n            while True: pass\n        except BaseException: pass",
        ),
        "one long operation": ("f", "def f(x): return 3 ** (10 ** 9)"),
        "backtracking": ("f", "import re\ndef f(x): return re.match('(a*)*b', 'a' * 64)"),
        "endless threads": (
            "f",
            "import threading\ndef g():\n    while True: pass\nfor _ in range(8): threading.Thread(target=g).start()\n"
            "def f(x): g()",
        ),
        "endless iterator": ("items", "def f(x):\n    while True: yield 1"),
        "endless text": ("f", "class A:\n    def __eq__(s, o):\n        while True: pass\n    __repr__ = __str__ = __eq__\ndef f(x):\n    import time\n    while True: time.sleep(1)"),
        "collisions": ("member", "def f(x): return {i * (2 ** 61 - 1) for i in range(40000)}"),
    },
    "size": {
        "long text": ("f", "def f(x): return 'x' * (1 << 28)"),
        "long list": ("items", "def f(x): return [0] * (1 << 23)"),
        "deep list": ("f", "def f(x):\n    a = []\n    for _ in range(100000): a = [a]\n    return a"),
        "cyclic list": ("f", "def f(x):\n    a = []\n    a.append(a)\n    return a"),
        "large number": ("f", "def f(x): return 1 << (1 << 27)"),
        "deep message": (
            "f",
            "import os\ndef f(x):\n    d = b'[' * 4000000\n    os.write(4, len(d).to_bytes(4, 'big') + d)",
        ),
        "message without end": ("f", "import os\ndef f(x):\n    os.write(4, b'\\xff\\xff\\xff\\xff')\n    while True: os.write(4, b'x' * 65536)"),
        "flood of output": ("f", "import os\ndef f(x):\n    while True: os.write(1, b'x' * 65536); os.write(2, b'x' * 65536)"),
        "deep source": ("f", "x = " + "(" * 5000 + ")" * 5000),
        "long expression": ("f", "def f(x): return " + "-" * 200000 + "1"),
        "big decimal": ("near", "from decimal import Decimal\ndef f(x): return Decimal('1e999999')"),
        "range without end": ("items", "def f(x): return range(10 ** 18)"),
    },
}

# (name, tests of standard input and output, program)
STDIO_ROW = [{"input": "3\n", "output": "7\n"}, {"input": "0\n", "output": "1\n"}]
SCRIPTS: dict[str, str] = {
    "all the answers": "print(7)\nprint(1)",
    "nothing": "",
    "exit zero": "import sys\nsys.exit(0)",
    "right, then failing": "print(2 * int(input()) + 1, flush=True)\nraise ValueError",
    "right, then killed": "print(2 * int(input()) + 1, flush=True)\nimport ctypes\nctypes.string_at(0)",
    "right, then hanging": "import os, time\nprint(2 * int(input()) + 1, flush=True)\nos.close(1)\ntime.sleep(1e6)",
    "endless output": "while True: print('x' * 65536)",
    "output by a thread that stays": (
        "import threading, time\nthreading.Thread(target=lambda: [print(7), time.sleep(1e6)]).start()"
    ),
    "terminal tricks": "print('8\\b7\\r')",
    "other digits": "print('٧')",
    "not text": "import os\nos.write(1, b'\\xff7')",
    "not a number": "print('nan')",
    "reading the expected output": (
        "import os\nfor fd in range(3, 64):\n    try: print(os.read(fd, 100).decode())\n    except (OSError, ValueError): pass"
    ),
    "writing the input": "import os\nos.write(0, b'7')\nprint(os.pread(0, 9, 0).decode())",
}
