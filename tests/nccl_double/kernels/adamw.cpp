#include "on_host.hpp"
#include KERNEL

extern "C" void adamw_on_host(unsigned int blocks, unsigned int threads, void **arguments) { run(adamw, blocks, threads, arguments); }
