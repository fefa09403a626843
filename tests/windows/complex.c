/* The complex functions of Windows' C runtime that wine 10 has only as stubs that abort, and numpy 2 calls at import.
   Structures instead of _Complex: this is how Windows passes them, whatever the compiler makes of _Complex. */
typedef struct { double re, im; } C;
typedef struct { float re, im; } F;

double cos(double), cosh(double), exp(double), hypot(double, double), atan2(double, double), log(double), sin(double),
    sinh(double);
int _fltused; /* what compilers for Windows ask for wherever there are floats */

static C make(double re, double im) { return (C){re, im}; }
static C turned(C z) { return make(-z.im, z.re); } /* i z */
static C back(C z) { return make(z.im, -z.re); }   /* z / i */
static C e(C z) { return make(exp(z.re) * cos(z.im), exp(z.re) * sin(z.im)); }
static C ch(C z) { return make(cosh(z.re) * cos(z.im), sinh(z.re) * sin(z.im)); }
static C sh(C z) { return make(sinh(z.re) * cos(z.im), cosh(z.re) * sin(z.im)); }
static C th(C z) {
    double d = cosh(2 * z.re) + cos(2 * z.im);
    return z.re > 350 ? make(1, 0) : z.re < -350 ? make(-1, 0) : make(sinh(2 * z.re) / d, sin(2 * z.im) / d);
}
static C power(C z, C w) {
    if (!z.re && !z.im) return make(!w.re && !w.im, 0);
    double r = log(hypot(z.re, z.im)), a = atan2(z.im, z.re);
    return e(make(w.re * r - w.im * a, w.re * a + w.im * r));
}
static C cosine(C z) { return ch(turned(z)); }
static C sine(C z) { return back(sh(turned(z))); }
static C tangent(C z) { return back(th(turned(z))); }
static double length(C z) { return hypot(z.re, z.im); }
static double angle(C z) { return atan2(z.im, z.re); }
static double real(C z) { return z.re; }
static double imaginary(C z) { return z.im; }

static C wide(F z) { return make(z.re, z.im); }
static F narrow(C z) { return (F){(float)z.re, (float)z.im}; }

#define OUT __declspec(dllexport)
/* long double is double on Windows */
#define TO_REAL(name, of)                               \
    OUT double x_##name(C z) { return of(z); }           \
    OUT double x_##name##l(C z) { return of(z); }        \
    OUT float x_##name##f(F z) { return (float)of(wide(z)); }
#define TO_COMPLEX(name, of)                            \
    OUT C x_##name(C z) { return of(z); }                \
    OUT C x_##name##l(C z) { return of(z); }             \
    OUT F x_##name##f(F z) { return narrow(of(wide(z))); }
TO_REAL(cabs, length) TO_REAL(carg, angle) TO_REAL(creal, real) TO_REAL(cimag, imaginary)
TO_COMPLEX(cexp, e) TO_COMPLEX(ccosh, ch) TO_COMPLEX(csinh, sh) TO_COMPLEX(ctanh, th)
TO_COMPLEX(ccos, cosine) TO_COMPLEX(csin, sine) TO_COMPLEX(ctan, tangent)
OUT C x_cpow(C z, C w) { return power(z, w); }
OUT C x_cpowl(C z, C w) { return power(z, w); }
OUT F x_cpowf(F z, F w) { return narrow(power(wide(z), wide(w))); }

int DllMainCRTStartup(void *module, unsigned reason, void *reserved) { return 1; }
