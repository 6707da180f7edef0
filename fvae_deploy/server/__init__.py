"""`fvae serve`: jobs over HTTP for several users, one engine, one folder.

    client --HTTP--> app.py --store.py (SQLite)--> worker.py, a process with the engine
                       |        jobs/ID/...              |
                     guard.py, auth.py, uploads.py     supervisor.py starts it again where it dies

The folder is all there is: jobs are rows, uploads and results files below `jobs/ID`. Server and
worker meet in it alone, so that either may be killed at any time and go on from there.
"""
