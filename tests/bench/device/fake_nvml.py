"""NVML as the package shows it, over a list of cards: answers, refusals and a driver that is not there."""

from types import SimpleNamespace

GPU_A, GPU_B = "GPU-aaaaaaaa-1111-2222-3333-444444444444", "GPU-aaaabbbb-5555-6666-7777-888888888888"
MIG_A = "MIG-cccccccc-1111-2222-3333-444444444444"
MIB = 1 << 20


class NVMLError(Exception):
    pass


def card(uuid=GPU_A, used=500 * MIB, total=80 << 30, processes=(), energy=7_000, parts=None, name="Card", ecc=(1, 1), clock=1980):
    return SimpleNamespace(uuid=uuid, used=used, total=total, processes=processes, energy=energy, parts=parts, name=name, ecc=ecc, clock=clock)


class FakeNvml:
    NVMLError = NVMLError
    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2

    def __init__(self, *cards, fails=None):
        self.cards, self.fails = cards, fails

    def nvmlInit(self):
        if self.fails:
            raise NVMLError(self.fails)

    def nvmlDeviceGetCount(self):
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, number):
        return self.cards[number]

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return next(found for top in self.cards for found in (top, *(top.parts or ())) if found.uuid == uuid)

    def nvmlDeviceGetUUID(self, found):
        return found.uuid

    def nvmlDeviceGetName(self, found):
        return found.name.encode()

    def nvmlDeviceGetMigMode(self, found):
        return (int(found.parts is not None), 0)

    def nvmlDeviceGetMaxMigDeviceCount(self, found):
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, found, number):
        if number >= len(found.parts):
            raise NVMLError("Not Found")
        return found.parts[number]

    def nvmlDeviceGetMemoryInfo(self, found):
        if found.used is None:
            raise NVMLError("GPU is lost")
        return SimpleNamespace(used=found.used, total=found.total)

    def nvmlDeviceGetTotalEnergyConsumption(self, found):
        return self._told(found.energy)

    def nvmlDeviceGetEccMode(self, found):
        return self._told(found.ecc)

    def nvmlDeviceGetClockInfo(self, found, kind):
        return self._told(found.clock)

    def nvmlDeviceGetMaxClockInfo(self, found, kind):
        return self._told(found.clock)

    def nvmlDeviceGetComputeRunningProcesses(self, found):
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in self._told(found.processes)]

    def nvmlSystemGetDriverVersion(self):
        return "580.65"

    def nvmlSystemGetCudaDriverVersion_v2(self):
        return 13_010

    @staticmethod
    def _told(value):
        if value is None:
            raise NVMLError("Not Supported")
        return value
