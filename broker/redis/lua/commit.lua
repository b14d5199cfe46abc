-- Accepts messages of one app: they are in its log afterwards, with their ids, or nothing has happened.
-- KEYS[1]: <tag>:log (list: "<msg_id> <the lasting broadcast before it> " and the row); beside it :head (hash: id, the last
-- one given; broadcast, the last lasting one; number, swept, in: see log_look.lua; at, of the last commit), :lock ("<holder>
-- <until, ms>"), :live, :cid:<cid> ("<msg_id> <expires_at> <sendno>"), :done:<token>, records (records.lua).
-- ARGV: 1 tag, 2 token of the call, 3 least id, 4 now, 5 holder, 6 its lock until (ms), 7 milliseconds the lock's key is kept,
-- 8 number in the index of logs (0: none), 9 record changes, 10 when the cids are free again, 11 milliseconds they are kept,
-- 12 longest log; then for each message: when it expires, if it is a lasting broadcast, else ""; cid or ""; sendno; row.
-- Answer: {"index", number}: the app must be put into the index of logs with this number first; {"refused", why, text};
-- or {first id, 1 the lock is given to the holder | else who has it, entries before, the lasting broadcast before,
-- id of the entry before ("0": none), position from 0, msg_id and sendno of those whose cid was used}.
-- include records
-- repeatable
local log, tag, done = KEYS[1], ARGV[1], ARGV[1] .. ":done:" .. ARGV[2]
local now = tonumber(ARGV[4])
local before = redis.call("GET", done)
if before then
  return cmsgpack.unpack(before)
end
if redis.call("EXISTS", tag .. ":deleted") == 1 then
  return {"refused", "deleted", tag}
end
local changes = read_changes(ARGV[9])
local refusal = check_changes(tag, changes)
if refusal then
  return refusal
end
local length = redis.call("LLEN", log)
if length >= tonumber(ARGV[12]) then
  return {"refused", "full", string.format("%.0f pushes wait to be spread", length)}
end
local head = redis.call("HMGET", tag .. ":head", "id", "broadcast", "swept", "in")
if not head[4] and tonumber(ARGV[8]) <= tonumber(head[3] or 0) then
  return {"index", redis.call("HINCRBY", tag .. ":head", "number", 1)}
end

local first = math.max(tonumber(head[1] or 0) + 1, tonumber(ARGV[3]))
local previous = head[2] or "0"
local newest = string.match(redis.call("LINDEX", log, -1) or "0", "^%d+")
local answer = {string.format("%.0f", first), "", length, previous, newest}
local ids, repeated, entries = {}, {}, {}
for message = 13, #ARGV, 4 do
  local expires, cid, sendno, row = ARGV[message], ARGV[message + 1], ARGV[message + 2], ARGV[message + 3]
  local position = (message - 13) / 4
  local id = string.format("%.0f", first + position)
  ids[position + 1] = id
  local used, until_, its_sendno
  if cid ~= "" then
    used, until_, its_sendno = string.match(redis.call("GET", tag .. ":cid:" .. cid) or "", "^(%d+) (%S+) (.*)$")
  end
  if used and tonumber(until_) > now then
    repeated[position + 1] = true
    answer[#answer + 1] = position
    answer[#answer + 1] = used
    answer[#answer + 1] = its_sendno
  else
    if cid ~= "" then
      redis.call("SET", tag .. ":cid:" .. cid, id .. " " .. ARGV[10] .. " " .. sendno, "PX", ARGV[11])
    end
    entries[#entries + 1] = id .. " " .. previous .. " " .. row
    if expires ~= "" then
      redis.call("ZADD", tag .. ":live", expires, id)
      previous = id
    end
  end
end
make_changes(tag, changes, ids, repeated)
for from = 1, #entries, 1000 do
  redis.call("RPUSH", log, unpack(entries, from, math.min(from + 999, #entries)))
end
if #entries > 0 then
  redis.call("HSET", tag .. ":head", "id", ids[#ids], "broadcast", previous, "in", 1, "at", ARGV[4])
end
if #entries + length > 0 then
  local holder, lasts = string.match(redis.call("GET", tag .. ":lock") or "", "^(%S+) (%d+)$")
  if holder and tonumber(lasts) > now * 1000 then
    answer[2] = holder
  else
    redis.call("SET", tag .. ":lock", ARGV[5] .. " " .. ARGV[6], "PX", ARGV[7])
    answer[2] = 1
  end
end
redis.call("SET", done, cmsgpack.pack(answer), "PX", 60000)
return answer
