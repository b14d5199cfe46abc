-- Looks at one app of the index of logs, {spread}:apps (zset: app -> number). The app is in it before its first commit
-- and stays for a while: <tag>:head says "in". To leave, first the log, if it is empty, refuses every number up to the
-- one it has there ("swept"); then the index forgets it, unless a greater one came. Whoever slept between two of these
-- steps does no harm: a commit with an old number is refused, and old numbers remove no newer ones.
-- KEYS[1]: <tag>:log. ARGV: tag, now, seconds without a commit after which it leaves, its number there.
-- Answer: 2 the log waits for somebody | 1 the index may forget it | 0.
-- repeatable
local log, head, now = KEYS[1], ARGV[1] .. ":head", tonumber(ARGV[2])
local owner, lasts = string.match(redis.call("GET", ARGV[1] .. ":lock") or "", "^(%S+) (%d+)$")
if redis.call("LLEN", log) > 0 then
  return (owner and tonumber(lasts) > now * 1000) and 0 or 2
end
if tonumber(redis.call("HGET", head, "at") or 0) > now - tonumber(ARGV[3]) then
  return 0
end
local swept = tonumber(redis.call("HGET", head, "swept") or 0)
if redis.call("EXISTS", head) == 1 and tonumber(ARGV[4]) > swept then
  redis.call("HSET", head, "swept", ARGV[4])
  redis.call("HDEL", head, "in")
end
return 1
