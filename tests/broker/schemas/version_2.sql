-- The tables as schema version 2 made them.

CREATE TABLE apps (
    app_id INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used again, so that no cache can mix two apps up
    key TEXT NOT NULL UNIQUE, name TEXT NOT NULL, master_secret TEXT NOT NULL, device_key TEXT NOT NULL,
    signing_key BLOB NOT NULL, open INTEGER NOT NULL, created_at REAL NOT NULL,
    offline_limit INTEGER NOT NULL,
    deleted INTEGER NOT NULL DEFAULT 0,
    purged_to INTEGER NOT NULL DEFAULT 0,  -- of a deleted app: its messages up to this id are gone
    access TEXT NOT NULL DEFAULT '[]');

CREATE INDEX deleted_apps ON apps (app_id) WHERE deleted;

CREATE TABLE devices (
    app INTEGER NOT NULL, devno INTEGER NOT NULL, rid TEXT NOT NULL, platform TEXT NOT NULL, alias TEXT,
    tags TEXT NOT NULL, mobile TEXT, generation INTEGER NOT NULL, created_at REAL NOT NULL,
    last_online_at REAL,
    PRIMARY KEY (app, devno)) WITHOUT ROWID;

CREATE UNIQUE INDEX devices_by_rid ON devices (app, rid);

CREATE INDEX revoked_devices ON devices (app, devno, generation) WHERE generation > 0;

CREATE TABLE postings (  -- chunk = devno >> 16: one changed tag rewrites at most 8 KB
    app INTEGER NOT NULL, kind TEXT NOT NULL, value TEXT NOT NULL, chunk INTEGER NOT NULL, bits BLOB NOT NULL,
    PRIMARY KEY (app, kind, value, chunk)) WITHOUT ROWID;

CREATE TABLE messages (
    msg_id INTEGER PRIMARY KEY, app INTEGER NOT NULL, broadcast INTEGER NOT NULL,
    body BLOB,  -- NULL once nobody can be owed it
    created_at REAL NOT NULL, expires_at REAL NOT NULL, sendno TEXT NOT NULL,
    target NOT NULL,  -- a devno (INTEGER), or a bitmap (BLOB); the same for the next two
    delivered, evicted);

CREATE INDEX messages_by_expiry ON messages (expires_at) WHERE body IS NOT NULL;

CREATE INDEX live_broadcasts ON messages (app, msg_id) WHERE broadcast AND body IS NOT NULL;

CREATE TABLE settled (  -- what bitmap messages got since they were folded last
    msg_id INTEGER NOT NULL, delivered BLOB, evicted BLOB);

CREATE INDEX settled_by_message ON settled (msg_id);

CREATE TABLE inbox (
    app INTEGER NOT NULL, devno INTEGER NOT NULL, msg_id INTEGER NOT NULL,
    PRIMARY KEY (app, devno, msg_id)) WITHOUT ROWID;

CREATE TABLE cids (
    app INTEGER NOT NULL, cid TEXT NOT NULL, msg_id INTEGER NOT NULL, expires_at REAL NOT NULL,
    PRIMARY KEY (app, cid)) WITHOUT ROWID;

CREATE INDEX cids_by_expiry ON cids (expires_at);

CREATE TABLE receipts (
    msg_id INTEGER NOT NULL, event TEXT NOT NULL, chunk INTEGER NOT NULL, bits BLOB NOT NULL,
    PRIMARY KEY (msg_id, event, chunk)) WITHOUT ROWID;

CREATE TABLE events (
    id INTEGER PRIMARY KEY, app INTEGER NOT NULL, devno INTEGER NOT NULL, name TEXT NOT NULL,
    at REAL NOT NULL, payload BLOB NOT NULL);

CREATE INDEX events_by_app ON events (app);

CREATE TABLE retained (
    app INTEGER NOT NULL, topic TEXT NOT NULL, payload BLOB NOT NULL, qos INTEGER NOT NULL,
    properties BLOB NOT NULL, expires_at REAL, source TEXT NOT NULL DEFAULT '', PRIMARY KEY (app, topic));

CREATE INDEX retained_by_expiry ON retained (expires_at) WHERE expires_at IS NOT NULL;

CREATE TABLE session_items (
    app INTEGER NOT NULL, session INTEGER NOT NULL, kind TEXT NOT NULL,
    item BLOB NOT NULL,  -- of BLOB affinity: 1 and '1' stay apart
    value BLOB NOT NULL, PRIMARY KEY (app, session, kind, item)) WITHOUT ROWID;

CREATE TABLE high_water (
    id INTEGER NOT NULL,  -- the greatest message or event id given out before the last purge
    epoch INTEGER NOT NULL);

INSERT INTO high_water VALUES (0, 0);
