-- Erases routes of a node that will not come back.
-- KEYS[1]: {a.p}:routes. ARGV: node, at most so many. Answer: how many were erased.
-- repeatable
local prefix, dead, most = string.sub(KEYS[1], 1, -7), ARGV[1], tonumber(ARGV[2])
if redis.call("HEXISTS", prefix .. "nodes", dead) == 0 then
  return 0
end
local routes, name = redis.call("GET", KEYS[1]) or "", struct.pack(">I4", tonumber(dead))
local erased = 0
for at = 1, #routes, 12 do
  if string.sub(routes, at, at + 3) == name then
    local offset = (at - 1) / 12
    redis.call("SETRANGE", KEYS[1], at - 1, "\0\0\0\0")
    redis.call("SETBIT", prefix .. "on", offset - offset % 8 + 7 - offset % 8, 0)
    erased = erased + 1
    if erased == most then
      break
    end
  end
end
if erased < most or redis.call("HINCRBY", prefix .. "nodes", dead, -erased) <= 0 then
  redis.call("HDEL", prefix .. "nodes", dead)
end
return erased
