// "cuda" for a torch without CUDA: two devices of host memory, CPU kernels, and CUDA's demand that tensors of one
// operation lie on one device. Values are the CPU's; speed, CUDA's own kernels and their rounding are not shown.
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/Resize.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <map>

namespace {
using at::Tensor;
using c10::Device, c10::DeviceIndex, c10::DispatchKey, c10::DispatchKeySet, c10::IValue, c10::Storage;
constexpr DeviceIndex COUNT = 2;
thread_local DeviceIndex current = 0;

struct HostMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    void* memory = n ? c10::alloc_cpu(n) : nullptr;
    return {memory, memory, &c10::free_cpu, Device(c10::kCUDA, current)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
} allocator;
const bool registered = (c10::SetAllocator(c10::kCUDA, &allocator, 100), true);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = c10::kCUDA;
  c10::DeviceType type() const override { return c10::kCUDA; }
  Device getDevice() const override { return {c10::kCUDA, current}; }
  Device exchangeDevice(Device d) const override { auto before = getDevice(); setDevice(d); return before; }
  void setDevice(Device d) const override {
    TORCH_CHECK(d.index() < COUNT, "CUDA error: invalid device ordinal");
    uncheckedSetDevice(d);
  }
  void uncheckedSetDevice(Device d) const noexcept override { if (d.index() >= 0) current = d.index(); }
  c10::Stream getStream(Device d) const override { return c10::Stream(c10::Stream::DEFAULT, d); }
  c10::Stream getDefaultStream(Device d) const override { return getStream(d); }
  c10::Stream getStreamFromGlobalPool(Device d, bool) const override { return getStream(d); }
  c10::Stream exchangeStream(c10::Stream s) const override { return s; }
  DeviceIndex deviceCount() const noexcept override { return COUNT; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  void record(void**, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);
}  // namespace

namespace at {
struct CUDAHooks final : CUDAHooksInterface {  // the name under which torch looks for it
  CUDAHooks(CUDAHooksArgs) {}
  // without "override": what torch asks for differs between its versions
  void init() const {}
  bool isBuilt() const { return true; }
  bool isAvailable() const { return true; }
  bool hasCUDA() const { return true; }
  bool hasPrimaryContext(DeviceIndex) const { return true; }
  int getNumGPUs() const { return COUNT; }
  DeviceIndex deviceCount() const { return COUNT; }
  DeviceIndex current_device() const { return current; }
  DeviceIndex getCurrentDevice() const { return current; }
  void setCurrentDevice(DeviceIndex d) const { current = d; }
  DeviceIndex exchangeDevice(DeviceIndex d) const { return std::exchange(current, d); }
  DeviceIndex maybeExchangeDevice(DeviceIndex d) const { return std::exchange(current, d < 0 ? current : d); }
  bool isPinnedPtr(const void*) const { return false; }
  c10::Allocator* getPinnedMemoryAllocator() const { return c10::GetAllocator(kCPU); }
};
REGISTER_CUDA_HOOKS(CUDAHooks);
}  // namespace at

namespace {
Tensor tensor_like(const Tensor& t, Storage storage, DispatchKey key) {
  auto made = at::detail::make_tensor<at::TensorImpl>(std::move(storage), DispatchKeySet(key), t.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  if (t.unsafeGetTensorImpl()->is_wrapped_number()) made.unsafeGetTensorImpl()->set_wrapped_number(true);
  return made;
}

// The same bytes as another device's; the storage they belong to lives as long.
Storage same_bytes(const Storage& from, Device device) {
  auto* keeper = new Storage(from);
  c10::DataPtr data(const_cast<void*>(from.data()), keeper, [](void* p) { delete static_cast<Storage*>(p); }, device);
  return Storage(Storage::use_byte_size_t(), from.nbytes(), std::move(data), c10::GetAllocator(device.type()), true);
}

// Every operation that torch does not compose of others: on the CPU, through tensors that share the memory.
void on_the_cpu(const c10::OperatorHandle& op, DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& name = schema.name();
  const size_t n = schema.arguments().size(), base = stack->size() - n;
  const bool copies = name == "aten::copy_" || name == "aten::_copy_from";
  const bool indexes = name == "aten::index" || name == "aten::index_put_" || name == "aten::_index_put_impl_";
  std::optional<Device> where;
  std::vector<std::pair<Tensor, Tensor>> pairs;  // a CUDA tensor, and the CPU's of the same memory
  std::map<c10::StorageImpl*, Storage> storages;
  std::vector<Tensor> given;
  auto each = [&](auto&& change) {
    for (size_t i = 0; i < n; i++) {
      IValue& v = (*stack)[base + i];
      if (v.isTensor()) v = IValue(change(v.toTensor(), i));
      else if (v.isTensorList()) {
        c10::List<Tensor> list;
        for (const Tensor& t : v.toTensorVector()) list.push_back(change(t, i));
        v = IValue(list);
      } else if (v.isOptionalTensorList()) {
        c10::List<std::optional<Tensor>> list;
        for (std::optional<Tensor> t : v.toOptionalTensorList())
          list.push_back(t && t->defined() ? std::optional<Tensor>(change(*t, i)) : std::nullopt);
        v = IValue(list);
      } else if (v.isDevice() && v.toDevice().is_cuda()) {
        if (!where) where = v.toDevice();
        v = IValue(Device(c10::kCPU));
      }
    }
  };
  each([&](const Tensor& t, size_t) {
    if (t.defined() && t.is_cuda()) {
      if (!where) where = t.device();
      TORCH_CHECK(copies || *where == t.device(), "Expected all tensors to be on the same device, but found at least "
                  "two devices, ", *where, " and ", t.device(), ", in ", name);
    }
    return t;
  });
  each([&](const Tensor& t, size_t i) {
    if (!t.defined()) return t;
    if (!t.is_cuda()) {  // numbers may lie on the CPU, and what indexes
      const auto* alias = schema.arguments()[i].alias_info();
      TORCH_CHECK(copies || (indexes && i == 1) || (t.dim() == 0 && !(alias && alias->isWrite())), "Expected all tensors "
                  "to be on the same device, but found at least two devices, ", *where, " and cpu, in ", name);
      return t;
    }
    for (auto& [cuda, cpu] : pairs) if (cuda.is_same(t)) return cpu;
    auto* own = t.storage().unsafeGetStorageImpl();
    auto found = storages.find(own);
    if (found == storages.end()) found = storages.emplace(own, same_bytes(t.storage(), c10::kCPU)).first;
    pairs.emplace_back(t, tensor_like(t, found->second, DispatchKey::CPU));
    return pairs.back().second;
  });
  if (copies) (*stack)[base + n - 1] = IValue(false);  // non_blocking
  {
    c10::impl::ExcludeDispatchKeyGuard no_autograd(c10::autograd_dispatch_keyset);
    op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
  }
  const Device device = where.value_or(Device(c10::kCUDA, current));
  for (auto& [cuda, cpu] : pairs) {  // what was resized
    auto* own = cuda.storage().unsafeGetStorageImpl();
    if (cpu.storage().data() != cuda.storage().data()) {
      auto bytes = same_bytes(cpu.storage(), cuda.device());
      own->set_nbytes(bytes.nbytes());
      own->set_data_ptr_noswap(bytes.unsafeGetStorageImpl()->set_data_ptr(c10::DataPtr()));
    }
    if (cpu.sizes() != cuda.sizes() || cpu.strides() != cuda.strides())
      cuda.unsafeGetTensorImpl()->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
  }
  auto back = [&](const Tensor& t) -> Tensor {
    if (!t.defined() || !t.device().is_cpu()) return t;
    for (auto& [cuda, cpu] : pairs) if (cpu.is_same(t)) return cuda;
    for (auto& [cuda, cpu] : pairs)
      if (cpu.storage().unsafeGetStorageImpl() == t.storage().unsafeGetStorageImpl()) {  // a view
        auto view = at::detail::make_tensor<at::TensorImpl>(at::TensorImpl::VIEW, Storage(cuda.storage()), cuda.key_set(), t.dtype());
        view.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
        return view;
      }
    return copies ? t : tensor_like(t, same_bytes(t.storage(), Device(c10::kCUDA, std::max<DeviceIndex>(device.index(), 0))), DispatchKey::CUDA);
  };
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); i++) {
    IValue& v = (*stack)[i];
    if (v.isTensor()) v = IValue(back(v.toTensor()));
    else if (v.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : v.toTensorVector()) list.push_back(back(t));
      v = IValue(list);
    }
  }
}

using Type = std::optional<c10::ScalarType>;
c10::ScalarType type_of(Type t) { return t.value_or(c10::typeMetaToScalarType(c10::get_default_dtype())); }
Tensor empty(c10::IntArrayRef size, Type type, std::optional<c10::Layout>, std::optional<Device> device,
             std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  c10::DeviceGuard guard(device.value_or(Device(c10::kCUDA, current)));
  return at::detail::empty_generic(size, &allocator, DispatchKeySet(DispatchKey::CUDA), type_of(type), format);
}
Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, Type type, std::optional<c10::Layout>,
                     std::optional<Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(device.value_or(Device(c10::kCUDA, current)));
  return at::detail::empty_strided_generic(size, stride, &allocator, DispatchKeySet(DispatchKey::CUDA), type_of(type));
}
Tensor& set_storage(Tensor& self, Storage s, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(s));
  impl->set_storage_offset(offset);
  if (stride.empty()) impl->set_sizes_contiguous(size);
  else impl->set_sizes_and_strides(size, stride, offset);
  return self;
}
Tensor& set_tensor(Tensor& self, const Tensor& t) {
  return set_storage(self, t.storage(), t.storage_offset(), t.sizes(), t.strides());
}
Tensor& set_whole_storage(Tensor& self, Storage s) {
  const int64_t n = s.nbytes() / self.itemsize();
  return set_storage(self, std::move(s), 0, {n}, {});
}
const Tensor& resize(const Tensor& self, c10::IntArrayRef size, std::optional<c10::MemoryFormat>) {
  c10::DeviceGuard guard(self.device());
  at::native::resize_impl_cpu_(self.unsafeGetTensorImpl(), size, std::nullopt);
  return self;
}
TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Storage", set_whole_storage);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("resize_", resize);
  for (auto* name : {"copy_", "convolution", "convolution_backward"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>());
}
}  // namespace

extern "C" int pretend_get_device() { return current; }
extern "C" void pretend_set_device(int d) { Guard().setDevice(Device(c10::kCUDA, (DeviceIndex)d)); }
