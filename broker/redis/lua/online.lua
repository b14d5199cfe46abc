-- KEYS[1]: {a.p}:routes. Answer: the bits of those with a route (nil: nobody), the nodes of these routes.
-- reads only
local prefix = string.sub(KEYS[1], 1, -7)
return {redis.call("GET", prefix .. "on"), redis.call("HKEYS", prefix .. "nodes")}
