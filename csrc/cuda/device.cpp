// What the launchers ask of torch and of the device, and the record of bad input that kernels
// write.
#include "device.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <map>
#include <mutex>
#include <stdexcept>
#include <tuple>

// Torch's CUDA library has this symbol. A CPU build of torch does not, and must still load the
// extension.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace fused_ce {
namespace {

void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA error: ", cudaGetErrorString(error));
}

std::atomic<Report*> report_memory{nullptr};

}  // namespace

DeviceGuard::DeviceGuard(int32_t device_index) : current_(device_index) {
  check(cudaGetDevice(&previous_));
  if (previous_ != current_) check(cudaSetDevice(current_));
}

DeviceGuard::~DeviceGuard() {
  if (previous_ != current_) cudaSetDevice(previous_);
}

cudaStream_t current_stream(int32_t device_index) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "this torch was built without CUDA");
  void* stream;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream) == AOTI_TORCH_SUCCESS,
                  "cannot get the current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

DeviceLimits device_limits(int32_t device_index) {
  static std::mutex mutex;
  static std::map<int32_t, DeviceLimits> known;
  std::lock_guard<std::mutex> lock(mutex);
  auto found = known.find(device_index);
  if (found != known.end()) return found->second;
  auto attribute = [&](cudaDeviceAttr which) {
    int value;
    check(cudaDeviceGetAttribute(&value, which, device_index));
    return value;
  };
  return known[device_index] = {
             attribute(cudaDevAttrMultiProcessorCount),
             attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
             attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
             attribute(cudaDevAttrComputeCapabilityMajor) >= 9 && compiled_architecture() >= 90};
}

int resident_blocks(const void* kernel, int shared_bytes, int cluster, int blocks) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, int, int>, int> known;
  std::lock_guard<std::mutex> lock(mutex);
  int device;
  check(cudaGetDevice(&device));
  auto key = std::make_tuple(device, kernel, shared_bytes, cluster);
  auto found = known.find(key);
  if (found == known.end()) {
    DeviceLimits limits = device_limits(device);
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, kernel));
    // The limit is the kernel's, for all threads of the program: always the highest one, since a
    // launch of another thread may be under way.
    int most = limits.shared_memory - static_cast<int>(attributes.sharedSizeBytes);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
    int count;
    if (cluster > 1) {
      cudaLaunchAttribute shape{};
      shape.id = cudaLaunchAttributeClusterDimension;
      shape.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
      cudaLaunchConfig_t config{};
      config.gridDim = dim3(cluster);
      config.blockDim = dim3(kThreads);
      config.dynamicSmemBytes = shared_bytes;
      config.attrs = &shape;
      config.numAttrs = 1;
      check(cudaOccupancyMaxActiveClusters(&count, kernel, &config));
      count *= cluster;
    } else {
      check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, kThreads, shared_bytes));
      count *= limits.multiprocessors;
    }
    found = known.emplace(key, count).first;
  }
  int resident = found->second;
  return resident > 0 && resident < blocks ? resident : blocks;
}

int multiprocessors(int32_t device_index) { return device_limits(device_index).multiprocessors; }

void check_launch() { check(cudaGetLastError()); }

Report* shared_report() {
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock(mutex);
  if (report_memory == nullptr) {
    void* memory;
    // A capture, here or on another thread, otherwise forbids to allocate. The memory is not part
    // of the graph.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    check(cudaThreadExchangeStreamCaptureMode(&mode));
    cudaError_t error =
        cudaHostAlloc(&memory, sizeof(Report), cudaHostAllocMapped | cudaHostAllocPortable);
    check(cudaThreadExchangeStreamCaptureMode(&mode));
    check(error);
    *static_cast<Report*>(memory) = Report{};
    report_memory = static_cast<Report*>(memory);
  }
  return report_memory;
}

std::string take_report() {
  Report* report = report_memory;
  if (report == nullptr) return "";
  std::atomic_ref<unsigned> state(report->state);
  if (state.load(std::memory_order_acquire) != 2) return "";
  std::string message;
  if (report->kind == Report::kLabel) {
    message = "Target " + std::to_string(report->label) + " is out of bounds (row " +
              std::to_string(report->index) + " of " + std::to_string(report->rows) +
              " in memory order).";
  } else {
    message = std::string("all elements of ") +
              (report->kind == Report::kTargetProbability ? "target" : "input") +
              " should be between 0 and 1, but element " + std::to_string(report->index) +
              " in memory order is " + std::to_string(report->value);
  }
  state.store(0, std::memory_order_release);
  return message;
}

void raise_report() {
  std::string pending = take_report();
  if (!pending.empty()) throw std::runtime_error(pending);
}

}  // namespace fused_ce
