-- KEYS[1]: {spread}:apps. ARGV: app, number. Removes the app, unless a greater number came.
-- repeatable
local number = redis.call("ZSCORE", KEYS[1], ARGV[1])
if number and tonumber(number) <= tonumber(ARGV[2]) then
  redis.call("ZREM", KEYS[1], ARGV[1])
end
