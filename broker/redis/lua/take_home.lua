-- Take an app on, unless somebody else was faster.
-- KEYS: {app}:home. ARGV: who had it (0: nobody), who wants it. Answer: who has it.
-- repeatable
local holder = redis.call("GET", KEYS[1]) or "0"
if holder == ARGV[1] then
  redis.call("SET", KEYS[1], ARGV[2])
  holder = ARGV[2]
end
return tonumber(holder)
