// A device that is not the CPU, in the CPU's memory: what mixes devices fails as on a GPU.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <set>

namespace {

constexpr auto kStandIn = c10::DeviceType::PrivateUse1;
const c10::Device kDevice(kStandIn, 0);

// ---------------------------------------------------------------- memory

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? aligned_alloc(64, (bytes + 63) / 64 * 64) : nullptr;
    return {data, data, &free, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, std::size_t count) const override { std::memcpy(to, from, count); }
};
Allocator allocator;
REGISTER_ALLOCATOR(kStandIn, &allocator)

struct Guard final : c10::impl::NoOpDeviceGuardImpl<kStandIn> {
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Stream getNewStream(c10::Device, int) const override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

// ---------------------------------------------------------------- random numbers

// Numbers of another sequence than the CPU's, as those of every accelerator are.
struct GeneratorImpl final : c10::GeneratorImpl {
  at::Generator inner = at::detail::createCPUGenerator(c10::default_rng_seed_val);
  uint64_t told = c10::default_rng_seed_val;
  GeneratorImpl() : c10::GeneratorImpl(kDevice, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)) {}
  void set_current_seed(uint64_t seed) override {
    told = seed;
    inner.set_current_seed(seed ^ 0x5bd1e995u);
  }
  void set_offset(uint64_t offset) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return told; }
  uint64_t seed() override { return told = inner.seed(); }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return inner.unsafeGetGeneratorImpl()->get_state();
  }
  static c10::DeviceType device_type() { return kStandIn; }
  GeneratorImpl* clone_impl() const override {
    auto* copy = new GeneratorImpl();
    copy->inner = inner.clone();
    copy->told = told;
    return copy;
  }
};

const at::Generator& default_generator() {
  static at::Generator found = at::make_generator<GeneratorImpl>();
  return found;
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  at::Device getDeviceFromPtr(void*) const override { return kDevice; }
  at::Allocator* getPinnedMemoryAllocator() const override { return at::getCPUAllocator(); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<GeneratorImpl>(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto fresh = allocator.allocate(bytes);
    std::memcpy(fresh.get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.unsafeGetStorageImpl()->set_data_ptr(std::move(fresh));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};

// ---------------------------------------------------------------- operations

bool is_standin(const at::Tensor& tensor) { return tensor.defined() && tensor.device().type() == kStandIn; }

at::Tensor as_cpu(const at::Tensor& tensor) {
  auto options = tensor.options().device(c10::kCPU);
  if (tensor.numel() == 0 && tensor.storage().nbytes() == 0) return at::empty_strided(tensor.sizes(), tensor.strides(), options);
  auto found = at::from_blob(const_cast<void*>(tensor.storage().data()), {(int64_t)(tensor.storage().nbytes() / tensor.itemsize())}, options);
  return at::native::as_strided_tensorimpl(found, tensor.sizes(), tensor.strides(), tensor.storage_offset());
}

at::Tensor as_standin(const at::Tensor& tensor) {
  auto source = tensor.is_non_overlapping_and_dense() ? tensor : tensor.contiguous();
  auto found = at::empty_strided(source.sizes(), source.strides(), source.options().device(kDevice).pinned_memory(false));
  if (source.numel()) std::memcpy(found.data_ptr(), source.data_ptr(), source.numel() * source.itemsize());
  return found;
}

// Operations that take indices, numbers or sizes from the CPU on GPUs as well.
bool takes_cpu(const std::string& name) {
  static const std::set<std::string> found{"aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put",
    "aten::_amp_foreach_non_finite_check_and_unscale_", "aten::_fused_adamw_", "aten::_fused_adam_"};
  return found.count(name) > 0;
}

struct Silent final : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto& schema = op.schema();
  const auto count = schema.arguments().size();
  const auto first = stack->size() - count;
  std::vector<std::pair<at::Tensor, at::Tensor>> moved;  // ours, and the same memory as the CPU's
  const auto move = [&](const at::Tensor& tensor) -> at::Tensor {
    if (!tensor.defined()) return tensor;
    if (!is_standin(tensor)) {
      TORCH_CHECK(tensor.dim() == 0 || takes_cpu(schema.name()) || !tensor.device().is_cpu(),
        "Expected all tensors to be on the same device, but found at least two devices, standin:0 and cpu! (", schema.name(), ")");
      return tensor;
    }
    for (auto& [ours, theirs] : moved) if (ours.is_same(tensor)) return theirs;
    moved.emplace_back(tensor, as_cpu(tensor));
    return moved.back().second;
  };
  for (size_t i = 0; i < count; ++i) {
    auto& value = (*stack)[first + i];
    if (value.isTensor()) {
      value = move(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(move(tensor));
      value = c10::IValue(c10::List<at::Tensor>(list));
    } else if (value.isOptionalTensorList()) {
      auto list = value.toOptionalTensorList();
      c10::List<std::optional<at::Tensor>> changed;
      for (size_t j = 0; j < list.size(); ++j) {
        const std::optional<at::Tensor> tensor = list.get(j);
        changed.push_back(tensor.has_value() ? std::optional<at::Tensor>(move(*tensor)) : std::nullopt);
      }
      value = c10::IValue(changed);
    } else if (value.isGenerator()) {
      auto generator = value.toGenerator();
      TORCH_CHECK(generator.device().type() == kStandIn, "Expected a 'standin' device type for generator but found '",
        generator.device().type(), "' (", schema.name(), ")");
      value = static_cast<GeneratorImpl*>(generator.unsafeGetGeneratorImpl())->inner;
    } else if (value.isNone() && schema.arguments()[i].name() == "generator") {
      value = static_cast<GeneratorImpl*>(default_generator().unsafeGetGeneratorImpl())->inner;
    } else if (value.isDevice()) {
      value = c10::Device(c10::kCPU);
    }
  }
  std::vector<std::vector<int64_t>> sizes;
  for (auto& pair : moved) sizes.push_back(pair.first.sizes().vec());
  {
    static Silent silent;  // outputs that have no size yet are resized, as they shall be
    c10::WarningUtils::WarningHandlerGuard guard(&silent);
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  }
  for (size_t i = 0; i < moved.size(); ++i) {
    auto& [ours, theirs] = moved[i];
    if (theirs.sizes().vec() != sizes[i]) {  // an output that was resized
      at::native::resize_(ours, theirs.sizes());
      if (theirs.numel()) as_cpu(ours).copy_(theirs);
    }
  }
  const auto back = [&](const at::Tensor& tensor) -> at::Tensor {
    if (!tensor.defined() || !tensor.device().is_cpu()) return tensor;
    for (auto& [ours, theirs] : moved) if (theirs.is_same(tensor)) return ours;
    for (auto& [ours, theirs] : moved)
      TORCH_CHECK(!tensor.numel() || !theirs.numel() || tensor.storage().data() != theirs.storage().data(), "a view by ", schema.name(), ": write it natively");
    return as_standin(tensor);
  };
  const auto returns = schema.returns().size();
  for (size_t i = stack->size() - returns; i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = back(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(back(tensor));
      value = c10::IValue(c10::List<at::Tensor>(list));
    }
  }
}

at::Tensor empty(c10::SymIntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                 std::optional<c10::Device>, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::ScalarType> dtype,
                         std::optional<c10::Layout>, std::optional<c10::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &allocator,
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

at::Tensor as_strided(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::SymInt> offset) {
  return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
    offset.has_value() ? std::optional<int64_t>(offset->expect_int()) : std::nullopt);
}

at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef size) { return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size)); }

at::Tensor reshape_alias(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

const at::Tensor& resize(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<c10::MemoryFormat> format) {
  return at::native::resize_(self, C10_AS_INTARRAYREF_SLOW(size), format);
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& to, bool) {
  auto source = is_standin(self) ? as_cpu(self) : self;
  auto target = is_standin(to) ? as_cpu(to) : to;
  target.copy_(source);
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& to) {
  if (self.sizes() != to.sizes()) at::native::resize_(to, self.sizes());
  return copy_from(self, to, false);
}

at::Scalar local_scalar(const at::Tensor& self) { return as_cpu(self).item(); }

at::Tensor& set_storage(at::Tensor& self, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(storage);
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return self;
}

at::Tensor& set_whole_storage(at::Tensor& self, at::Storage storage) {
  const c10::SymInt count((int64_t)(storage.nbytes() / self.itemsize()));
  return set_storage(self, storage, 0, {count}, {1});
}

at::Tensor unfold(const at::Tensor& self, int64_t dim, int64_t size, int64_t step) { return at::native::unfold(self, dim, size, step); }

at::Tensor& set_source_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_storage(self, source.storage(), source.sym_storage_offset(), source.sym_sizes(), source.sym_strides());
}

std::optional<at::Tensor> as_cpu(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() && tensor->defined() ? std::optional<at::Tensor>(as_cpu(*tensor)) : std::nullopt;
}

at::Tensor convolution(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                       at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding, int64_t groups) {
  TORCH_CHECK(is_standin(input) && is_standin(weight) && (!bias.has_value() || !bias->defined() || is_standin(*bias)),
    "Expected all tensors to be on the same device, but found at least two devices, standin:0 and cpu! (aten::convolution)");
  return as_standin(at::convolution(as_cpu(input), as_cpu(weight), as_cpu(bias), stride, padding, dilation, transposed, output_padding, groups).contiguous());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(const at::Tensor& gradient, const at::Tensor& input, const at::Tensor& weight,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding, int64_t groups,
    std::array<bool, 3> mask) {
  const auto channels = transposed ? weight.size(1) * groups : weight.size(0);
  auto found = at::convolution_backward(as_cpu(gradient), as_cpu(input), as_cpu(weight), at::IntArrayRef{channels}, stride, padding, dilation,
                                        transposed, output_padding, groups, mask);
  const auto back = [](const at::Tensor& tensor) { return tensor.defined() ? as_standin(tensor) : tensor; };
  return {back(std::get<0>(found)), back(std::get<1>(found)), back(std::get<2>(found))};
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", &as_strided);
  m.impl("view", &view);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("resize_", &resize);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Tensor", &set_source_tensor);
  m.impl("unfold", &unfold);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
  m.impl("view_as_real", &at::native::view_as_real);
  m.impl("view_as_complex", &at::native::view_as_complex);
}

namespace at::autocast {
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define STANDIN_LOW(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
  AT_FORALL_LOWER_PRECISION_FP(STANDIN_LOW)
#define STANDIN_FP32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
  AT_FORALL_FP32(STANDIN_FP32)
#define STANDIN_PROMOTE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  AT_FORALL_PROMOTE(STANDIN_PROMOTE)
}
}  // namespace at::autocast

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  m.def("default_generator", [] { return default_generator(); });
}
