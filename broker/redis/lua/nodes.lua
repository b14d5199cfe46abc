-- The table of the processes.
-- KEYS: {nodes}:table (number -> packed info); beside it :names (name -> number), :numbers (back), :wishes (name -> wish), :beats and
-- :gone (zsets: number -> last beat; when the end of its lease was noted, or a minute before that if it left), :state
-- (next number, version of the table).
-- ARGV: verb, now ("": the server's time), lease, grace, memory, the table's version that the caller knows, number,
-- name, packed info or wish, 1 if the table changes with it.
-- join -> number, 0 if a live one has the name; beat -> 0 | 1 (the lease had run out) | -1 (too long ago); leave and
-- wish -> 1, 0 if there is none; look -> 0. Then the version and, if the caller's is another: the next number, and
-- number, packed info, last beat, live, wish for each; then the dead ones' numbers whose routes may go.
-- volatile
local prefix = string.sub(KEYS[1], 1, -6)
local names, numbers, wishes = prefix .. "names", prefix .. "numbers", prefix .. "wishes"
local beats, gone, state = prefix .. "beats", prefix .. "gone", prefix .. "state"
local verb, now, lease, grace, memory, known, number, name, packed, changed = unpack(ARGV)
if now == "" then
  local time = redis.call("TIME")
  now = time[1] + time[2] / 1000000
else
  now = tonumber(now)
end

local function bump()
  redis.call("HINCRBY", state, "version", 1)
end

local function unname(which)
  local its = redis.call("HGET", numbers, which)
  if its and redis.call("HGET", names, its) == which then
    redis.call("HDEL", names, its)
    redis.call("HDEL", wishes, its)
  end
end

local function forget(which)
  unname(which)
  redis.call("HDEL", KEYS[1], which)
  redis.call("HDEL", numbers, which)
  redis.call("ZREM", beats, which)
  redis.call("ZREM", gone, which)
end

local function note(which)
  redis.call("ZADD", beats, string.format("%.6f", now), which)
  redis.call("HSET", KEYS[1], which, packed)
end

for _, which in ipairs(redis.call("ZRANGEBYSCORE", beats, "-inf", string.format("(%.6f", now - lease))) do
  if not redis.call("ZSCORE", gone, which) then
    redis.call("ZADD", gone, string.format("%.6f", now), which)
    bump()
  end
end
for _, which in ipairs(redis.call("ZRANGEBYSCORE", gone, "-inf", string.format("(%.6f", now - memory))) do
  forget(which)
  bump()
end

local answer = 0
if verb == "join" then
  local other = redis.call("HGET", names, name)
  if not other or redis.call("ZSCORE", gone, other) or not redis.call("ZSCORE", beats, other) then
    answer = redis.call("HINCRBY", state, "next", 1)
    number = string.format("%.0f", answer)
    redis.call("HSET", names, name, number)
    redis.call("HSET", numbers, number, name)
    redis.call("HDEL", wishes, name)
    note(number)
    bump()
  end
elseif verb == "beat" then
  local since = redis.call("ZSCORE", gone, number)
  if not redis.call("ZSCORE", beats, number) or (since and tonumber(since) <= now - grace)
    or redis.call("HGET", names, name) ~= number then
    answer = -1
  else
    if since then
      redis.call("ZREM", gone, number)
      answer = 1
    end
    note(number)
    if since or changed == "1" then
      bump()
    end
  end
elseif verb == "leave" then
  if redis.call("HDEL", KEYS[1], number) == 1 then
    answer = 1
    redis.call("ZREM", beats, number)
    redis.call("ZADD", gone, string.format("%.6f", now - grace), number)
    unname(number)
    bump()
  end
elseif verb == "wish" then
  if redis.call("HEXISTS", names, name) == 1 then
    answer = 1
    redis.call("HSET", wishes, name, packed)
    bump()
  end
end

-- It also changes when somebody's grace is over.
local over = string.format("%.6f", now - grace)
local version = (redis.call("HGET", state, "version") or "0") .. ":" .. redis.call("ZCOUNT", gone, "-inf", over)
if version == known then
  return {answer, version}
end
local nodes = {}
for _, which in ipairs(redis.call("ZRANGE", beats, 0, -1)) do
  nodes[#nodes + 1] = tonumber(which)
  nodes[#nodes + 1] = redis.call("HGET", KEYS[1], which)
  nodes[#nodes + 1] = redis.call("ZSCORE", beats, which)
  nodes[#nodes + 1] = redis.call("ZSCORE", gone, which) and 0 or 1
  nodes[#nodes + 1] = redis.call("HGET", wishes, redis.call("HGET", numbers, which) or "") or ""
end
local dead = {}
for index, which in ipairs(redis.call("ZRANGEBYSCORE", gone, "-inf", over)) do
  dead[index] = tonumber(which)
end
return {answer, version, redis.call("HGET", state, "next") or "0", nodes, dead}
