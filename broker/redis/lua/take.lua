-- One step of the spreader: lets go of what is rung, renews its lock, and gets the next entries, behind those that are in
-- its hands. It gives the lock up where it finds the log empty, so nothing is left without a holder.
-- KEYS[1]: <tag>:log. ARGV: tag; holder; lock until (ms); milliseconds its key is kept; now (ms); how many entries
-- are rung; the first one's id (if it is not in front, they went before: the answer was lost); most entries, most bytes; 1
-- if the lock may be taken while it is free; how many entries behind the rung ones it has in its hands.
-- Answer: {"lost", who has the lock} | {"empty"} | {"more", entry, …}.
-- repeatable
local log, lock, holder = KEYS[1], ARGV[1] .. ":lock", ARGV[2]
local owner, lasts = string.match(redis.call("GET", lock) or "", "^(%S+) (%d+)$")
if owner ~= holder then
  if ARGV[10] ~= "1" or (owner and tonumber(lasts) > tonumber(ARGV[5])) then
    return {"lost", owner or ""}
  end
end
local spread = tonumber(ARGV[6])
if spread > 0 then
  local front = redis.call("LINDEX", log, 0)
  if front and string.match(front, "^%d+") == ARGV[7] then
    redis.call("LTRIM", log, spread, -1)
  end
end
local most, bytes, skipped = tonumber(ARGV[8]), tonumber(ARGV[9]), tonumber(ARGV[11])
local answer = {"more"}
while bytes >= 0 and #answer <= most do
  local next_ones = redis.call("LRANGE", log, skipped + #answer - 1, skipped + #answer + 14)
  for _, entry in ipairs(next_ones) do
    bytes = bytes - #entry
    if (bytes < 0 and #answer > 1) or #answer > most then
      break
    end
    answer[#answer + 1] = entry
  end
  if #next_ones < 16 then
    break
  end
end
if #answer == 1 and redis.call("LLEN", log) == 0 then
  redis.call("DEL", lock)
  return {"empty"}
end
redis.call("SET", lock, holder .. " " .. ARGV[3], "PX", ARGV[4])
return answer
