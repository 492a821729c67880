// NVML with devices that a test describes: it writes `devices` and `init_code`.
#include <cstring>

struct Device {
  char uuid[64];
  unsigned long long millijoules;
  int energy_code;
  unsigned celsius;
  int celsius_code;
  unsigned mig_mode;
  int mig_code;
  unsigned processes;
  unsigned pids[256];
  int processes_code;
};

struct Process {
  unsigned pid;
  unsigned long long used_memory;
  unsigned gpu_instance;
  unsigned compute_instance;
};

extern "C" {

Device devices[4];
int init_code;

int nvmlInit_v2() { return init_code; }

const char* nvmlErrorString(int code) {
  switch (code) {
    case 3: return "Not Supported";
    case 6: return "Not Found";
    case 9: return "Driver Not Loaded";
    case 15: return "GPU is lost";
    default: return "Unknown Error";
  }
}

int nvmlDeviceGetHandleByUUID(const char* uuid, Device** device) {
  for (Device& each : devices) {
    if (each.uuid[0] != 0 && std::strcmp(each.uuid, uuid) == 0) {
      *device = &each;
      return 0;
    }
  }
  return 6;
}

int nvmlDeviceGetMigMode(Device* device, unsigned* now, unsigned* later) {
  *now = *later = device->mig_mode;
  return device->mig_code;
}

int nvmlDeviceGetTotalEnergyConsumption(Device* device, unsigned long long* millijoules) {
  *millijoules = device->millijoules;
  return device->energy_code;
}

int nvmlDeviceGetTemperature(Device* device, int sensor, unsigned* celsius) {
  *celsius = device->celsius;
  return sensor != 0 ? 2 : device->celsius_code;
}

#ifndef OLD_DRIVER
int nvmlDeviceGetComputeRunningProcesses_v3(Device* device, unsigned* count, Process* processes) {
  if (device->processes_code != 0) {
    return device->processes_code;
  }
  const unsigned room = *count;
  *count = device->processes;
  if (room < device->processes) {
    return 7;
  }
  for (unsigned i = 0; i < device->processes; ++i) {
    processes[i] = {device->pids[i], 1 << 20, ~0U, ~0U};
  }
  return 0;
}
#endif
}
