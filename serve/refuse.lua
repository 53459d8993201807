-- HAProxy's answer to an upload that it refuses in a storm (serve/proxy.py): the problem given to `lua-load-per-thread`.
-- The body is taken in first, and dropped: to close a connection with bytes unread resets it, and most clients then
-- lose the answer that they were sent. Then it waits a little, for the sake of clients that ask again at once.

local problem, hold_ms = ...
collectgarbage("setpause", 1000) -- of a state that keeps next to nothing
local PIECE, MOST = 16384, 64 * 1024 * 1024

core.register_service("refuse", "http", function(applet)
    local seen = 0
    repeat
        local piece = applet:receive(PIECE)
        seen = seen + #piece
    until #piece == 0 or seen > MOST
    core.msleep(tonumber(hold_ms))
    applet:set_status(503)
    applet:add_header("content-type", "application/problem+json")
    applet:add_header("content-length", #problem)
    applet:add_header("retry-after", "1")
    applet:start_response()
    applet:send(problem)
end)
