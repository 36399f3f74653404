/* In place of NVIDIA's driver, on a machine without a GPU: takes note of the last launch, and runs nothing.

   What Triton asks a driver for, to load a kernel and launch it, succeeds. A launch is noted byte by byte: the numbers of
   programs and threads, shared memory, stream, function and attributes, and the arguments, whose sizes must be given
   before, as a driver knows them from the kernel. */
#include <stdint.h>
#include <string.h>

#include "cuda.h"

static unsigned char noted[1 << 16];
static int length, launches, sizes[4096], arguments;

void set_sizes(int count, const int *of_arguments) {
  arguments = count;
  memcpy(sizes, of_arguments, count * sizeof(int));
}
int last_launch(unsigned char *into) {
  memcpy(into, noted, length);
  return length;
}
int number_of_launches(void) { return launches; }

static void note(const void *value, int size) {
  memcpy(noted + length, value, size);
  length += size;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **values, void **extra) {
  length = 0;
  launches++;
  note(&config->gridDimX, 6 * sizeof(unsigned)); /* programs and threads along three axes */
  note(&config->sharedMemBytes, sizeof(unsigned));
  note(&config->hStream, sizeof(void *));
  note(&function, sizeof function);
  note(&config->numAttrs, sizeof(unsigned));
  for (unsigned i = 0; i < config->numAttrs; i++) {
    note(&config->attrs[i].id, sizeof(int));
    note(&config->attrs[i].value, sizeof(int));
  }
  for (int i = 0; i < arguments; i++) note(values[i], sizes[i]);
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) { /* of an H100 */
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 232448; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    default: *value = 49152;
  }
  return CUDA_SUCCESS;
}

static CUcontext context = (CUcontext)0x10;
static intptr_t last_function = 0x1000;

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)(last_function += 16);
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = "an error of the recording driver";
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)value = pointer; /* a tensor on the CPU is where a GPU finds it, too */
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttributes(unsigned n, CUpointer_attribute *a, void **v, CUdeviceptr p) { return CUDA_SUCCESS; }
CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *current) { return *current = context, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext current) { return context = current, CUDA_SUCCESS; }
#undef cuCtxGetDevice /* a macro in some versions of cuda.h */
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 1 << 20, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int number) { return *device = number, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *retained, CUdevice device) { return *retained = context, CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { return *module = (CUmodule)0x20, CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) { return *status = 0, CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) { return *n = 1, CUDA_SUCCESS; }

/* Looked up, and never called: tensor maps are not used here. CUDA_ERROR_NOT_SUPPORTED is 801. */
int tiled(void) __asm__("cuTensorMapEncodeTiled");
int tiled(void) { return 801; }
int im2col(void) __asm__("cuTensorMapEncodeIm2col");
int im2col(void) { return 801; }
