#include "on_host.hpp"
#include KERNEL

ON_HOST(adamw)
