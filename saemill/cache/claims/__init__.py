"""Claims: any number of processes share out work with no coordinator but a folder, NFS included, or a bucket.

worker.py   a worker, and the claims that it makes
owner.py    who a worker is, and whether it is dead
board.py    what is written down of both, and under what names
files.py    that on a disk
objects.py  that in a bucket

    worker-<token>             a process that works here: who it is, as JSON; it touches the file as it lives
    <name>.<generation>        a claim on `name`: a hard link to its worker's file; in a bucket a copy of it
    worker-<token>.partial-<n> what that worker has not finished writing, on a disk

A claim appears at once with its content, exactly one process can make it, and one touch keeps all
claims of a worker alive. When a worker is dead, its claim is taken over by making the next
generation; the highest one counts. A worker is dead when its process is gone from this machine, or,
seen from elsewhere, when its file was not touched for long by the clock of the file system or bucket
itself: the time on a file that was touched just now.

A worker that was stopped for long may find on waking that it lost its claims; what it publishes
must therefore be checked (`Claim.check`) and must never replace what another published.
"""
