/* The kernels are compiled once for each kind of processor; VARIANT is part of every exported name. */
#pragma once

#define JOIN_(name, variant) name##_##variant
#define JOIN(name, variant) JOIN_(name, variant)
#define NAMED(name) JOIN(name, VARIANT)
#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif
#define ALWAYS_INLINE inline __attribute__((always_inline))
