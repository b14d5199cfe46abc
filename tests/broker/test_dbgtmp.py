import asyncio, time, importlib.util, sys
from pathlib import Path
spec=importlib.util.spec_from_file_location("tbp", Path(__file__).with_name("test_bridge_push.py")); m=importlib.util.module_from_spec(spec); sys.modules["tbp"]=m; spec.loader.exec_module(m)
mosquitto=m.mosquitto; bridged=m.bridged
async def test_rate(bridged, mosquitto):
    for window in (1,32):
        async with bridged.run(): pass
        await m.publish(mosquitto, *(("orders/ann/shipped", {"text": str(i)}) for i in range(2000)))
        t=time.perf_counter()
        async with bridged.run(window=window) as b:
            await m.until(lambda: b.stats.pushed==2000)
            print(window, 2000/(time.perf_counter()-t))
