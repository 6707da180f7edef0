"""`fvae serve`: jobs over HTTP for several users, with one engine and one folder.

    client --HTTP--> app.py --store.py (SQLite)--> worker.py, a process with the engine
                       |        jobs/ID/...              |
                     guard.py, auth.py, uploads.py     supervisor.py restarts it when it dies

The folder holds the whole state: jobs are rows in SQLite; uploads and results are files in
`jobs/ID`. Server and worker communicate only through it. So either process can be killed at any
time and continues from the folder when it is started again.
"""
