"""Whether two answers say the same: a table of hard pairs, and the quick path against math-verify."""

import re
from fractions import Fraction

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from dirl_cli.reward.algebra import math_verified
from dirl_cli.reward.equality import compared, plainly_equal, verified
from dirl_cli.reward.notation import number
from dirl_cli.reward.tidy import tidy

# A gold at the margin; after = what says the same, after ≠ what does not, three spaces between two answers.
TABLE = r"""# Numbers are compared exactly, however they are set.
540
    =   540   540.   +540   0540   540.0   $540$   \(540\)   \[540\]   **540**   540\\   `540`   \text{540}
    =   \mathbf{540}   {540}   (540)   2^2 \cdot 135   500+40   \frac{1080}{2}   540,
    ≠   541   -540   54   5400   540x   540.5   54 0   5 4 0   0   \frac{540}{2}   540!   x   \neg 540

# Separators of thousands: a comma, a thin space, a space; ', ' parts a list.
1200000
    =   1,200,000   1{,}200{,}000   1,\!200,\!000   1\,200\,000   1 200 000   1\ 200\ 000   1200000.00
    ≠   1,200   1,200,00   1.200.000   1, 200, 000   (1,200,000)
11,\! 111,\! 111,\! 100
    =   11111111100   11,111,111,100
    ≠   11, 111, 111, 100   11
221,8
    =   8, 221   8,221   m=221, n=8
    ≠   8221   221   221,9
2500,7500
    =   2,500, 7,500   7{,}500, 2{,}500   7500 and 2500
    ≠   2,500,7,500   25007500
-3
    =   −3   –3   - 3   -3.0   (-3)   -\frac{6}{2}
    ≠   3   --3   \pm 3   |-3|   -(-3)

# Fractions, mixed numbers and decimals have one exact value.
\frac{14}{3}
    =   \dfrac{14}{3}   \tfrac{14}3   \frac{28}{6}   14/3   14 / 3   4\frac{2}{3}   4 \frac23   {14}/{3}
    =   \frac{-14}{-3}   \left(\frac{14}{3}\right)   4.666667   14 \div 3   \frac{14}{3}.   14÷3
    ≠   4.67   4.6   4   \frac{3}{14}   -\frac{14}{3}   4 \cdot \frac{2}{3}   \frac{14}{30}   143   14:3:1
\frac43
    =   \frac{4}{3}   \frac 43   \frac4{3}   1\frac13
    ≠   43   \frac34
-\frac{1}{2}
    =   \frac{-1}{2}   \frac{1}{-2}   -0.5   -.5   -1/2
    ≠   \frac12   -2
137 \frac{1}{2}
    =   137.5   \frac{275}{2}   137 1/2   275/2
    ≠   \frac{137}{2}   68.5   137
0.15
    =   .15   0.150   \frac{3}{20}   15/100   0.15.   1.5 \times 10^{-1}
    ≠   0.16   0.1500001   15   1.5
.0000672
    =   6.72 \times 10^{-5}   6.72\cdot10^{-5}   \frac{672}{10^7}   0.0000672
    ≠   .0000673   0.000067   0   6.72   6.72 \times 10^{5}
1,000,000
    =   1000000   10^6   10^{6}   1\times10^6
    ≠   10^5   1,000   1,000,00
120000
    =   1.2 \times 10^5   12\times 10^{4}   1.2×10^5   120 \cdot 10^3
    ≠   1.2 \times 10^4   1.2 \times 105   1.2

# A decimal may round a number that none equals, to six places as math-verify does; else it is exact.
\frac13
    =   0.333333   0.33333333   0.3333333333
    ≠   0.333   0.33   0.3333   0.333334   0.3
0.333
    =   0.333   0.3330   \frac{333}{1000}
    ≠   \frac13   0.3333   0.33
\approx 0.333
    =   0.333   \frac13   0.3333   x \approx 0.333
    ≠   0.334   0.3   1/2
\frac{1}{3}
    =   \frac13 \approx 0.333   x = \frac13 \approx 0.33
    ≠   x \approx 0.333   \frac12 \approx 0.333

# What only algebra can tell goes to math-verify.
3\sqrt{13}
    =   \sqrt{117}   3 \sqrt {13}   \sqrt{13} \cdot 3   10.816654   \frac{39}{\sqrt{13}}
    ≠   3\sqrt{12}   10.8   \sqrt{39}   13\sqrt{3}   -3\sqrt{13}
11\sqrt2
    =   11\sqrt{2}   11 \sqrt 2   \sqrt{242}
    ≠   \sqrt{22}   11\sqrt[3]{2}   22
\frac{\pi}{2}
    =   \pi/2   π/2   0.5\pi   \frac{1}{2}\pi   1.570796
    ≠   1.57   90^\circ   2\pi   p/2
6 - 5i
    =   6-5i   -5i+6   6 - 5 i
    ≠   6 + 5i   -6 + 5i   5 - 6i   6 - 5   (6, -5)

# Percent: 50% is 0.5, and 50 where the question asks for percent; the gold does not tell which.
62.5\%
    =   62.5%   62.5 \%   62.5   0.625   \frac{5}{8}   62.5\text{ percent}   62.5 percent
    ≠   6.25   0.0625   0.625\%   625   63\%
8
    =   8\%   8 %   8\text{%}   8.0\%
    ≠   0.8\%   80\%   0.08\%
0.5
    =   50\%   \frac12   .5
    ≠   50   5\%   500\%

# Units: one alone is ignored, two must agree if they are units of measure; a letter is a variable.
90^\circ
    =   90   90^{\circ}   90°   90 \text{ degrees}   90 degrees   90\degree
    ≠   91   \frac{\pi}{2}   9
\frac{270}7\text{ degrees}
    =   \frac{270}{7}   \frac{270}{7}^\circ   270/7
    ≠   270   38.57
\$32,\!348
    =   32348   \$32,348   $32348$   32,348 dollars   \$32{,}348.00   32348 \text{ dollars}
    ≠   32.348   32349   \$323.48   32348 cents
864 \mbox{ inches}^2
    =   864   864 \text{ in}^2   864 \text{ square inches}   864 in^2   864\,\mathrm{in}^2   864 square inches
    ≠   6   6 \text{ ft}^2   864 \text{ cm}^2   72
12
    =   12 \text{ cm}^2   12 cm^2   12cm   12\ \mathrm{km/h}   12 apples   12~\text{ways}   12 minutes
    =   12 \text{ sq units}
    ≠   12x   12 y   12 \pi   13 cm   2d   12\text{ and } 13
5.4 \text{ cents}
    =   5.4   5.4 cents   5.4\text{ cent}
    ≠   \$5.4   5.4 dollars   54   \$0.054
3
    =   3
    ≠   3t   3s   3m   3 c   3d   3ab

# Bases: another subscript is another number; none at all is what the question asks for.
52_8
    =   52_{8}   52_8   52_{\text{8}}   (52)_8   52_{ 8}   52
    ≠   52_9   42   53_8   52_{10}   528   8_{52}
70
    =   70_{10}   70
    ≠   70_8   46_{16}   70_1

# Expressions.
x^2+2x+1
    =   (x+1)^2   1+2x+x^2   x^{2} + 2 \cdot x + 1
    ≠   x^2+2x   x^2-2x+1   (x+1)^3   y^2+2y+1   4
p - q
    =   -q+p   p-q
    ≠   q - p   p+q   pq
(a+5)(b+2)
    =   (b+2)(a+5)   ab+2a+5b+10
    ≠   (a+5)+(b+2)   (a+2)(b+5)   (a+5,b+2)
k+1
    =   1+k   k + 1   n=k+1
    ≠   n+1   k   k-1
\cot x
    =   \frac{\cos x}{\sin x}   \cot(x)   \frac{1}{\tan x}
    ≠   \tan x   \cos x   \cot y
m n-\lfloor m / 2\rfloor
    =   mn - \left\lfloor \frac{m}{2} \right\rfloor
    ≠   mn - \frac m2   mn - \lceil m/2 \rceil   mn
\binom{2n}{n}
    =   \binom{2 n}{n}   \dbinom{2n}{n}
    ≠   \binom{n}{2n}   2n
\frac{100!}{2^{50}}
    =   100!/2^{50}   \dfrac{100!}{2^{50}}
    ≠   \frac{100!}{2^{51}}   \frac{99!}{2^{50}}
\log_2 5
    =   \frac{\ln 5}{\ln 2}   \log_{2}(5)
    ≠   \log_5 2   \log 5   \ln 5
\sqrt{2}
    =   \sqrt2   \sqrt 2   2^{1/2}   1.414214   1.41421356
    ≠   1.414   -\sqrt{2}   \pm\sqrt{2}   2   \sqrt[3]{2}
0
    =   -0   0.0   \{0\}   x=0   0\%
    ≠   o   \emptyset   1   \infty   0.000001
\infty
    =   +\infty   ∞   x=\infty
    ≠   -\infty   0   8
2^{1009}
    =   2 \cdot 2^{1008}   2^{1009}
    ≠   2^{1008}   2018   1009^2

# Equations: a name is only a name, but two must agree; 5 = 3 is no 3.
5
    =   x=5   x = 2+3 = 5   10/2 = 5   f(2) = 5   AB=5   m+n = 5   \angle A = 5^\circ   |S| = 5   x = 5 \text{ cm}
    ≠   5=3   3=5   x \ne 5   x \le 5   6 \to 5   x=5, y=6   I think it is 5   x=50   5=x=6
\frac{3}{2}
    =   \frac{3}{2} = 1.5   x = \frac{6}{4} = \frac{3}{2}
    ≠   \frac{3}{2} = 1.6   \frac{6}{5} = \frac{3}{2}
x=5
    =   5   x = 5   x=5.0   5 = x
    ≠   y=5   x=6   x>5   x=5, x=6   6
m_{\max }=n^{2}-n-1
    =   n^2-n-1   m_{max} = n^2 - n - 1   m = n^2-n-1
    ≠   n^2-n   k = n^2-n-1
f(x)=2x
    =   2x   f(x) = 2x   f(x) = x+x
    ≠   f(x)=3x   f(x)=2   g(x)=2x
y = 2x + 3
    =   2x+3   y=3+2x   2x - y + 3 = 0   y-3=2x
    ≠   y = 3x+2   x = 2y+3   2y+3   y=2x
5x - 7y + 11z + 4 = 0
    =   10x - 14y + 22z + 8 = 0   -5x+7y-11z=4   5x-7y+11z=-4
    ≠   5x - 7y + 11z = 4   5x - 7y + 11z + 4   5x+7y+11z+4=0

# Inequalities and intervals say the same; open or closed matters.
x<2
    =   2>x   (-\infty, 2)   x \in (-\infty,2)   x \lt 2
    ≠   x>2   x \le 2   x<3   (-\infty, 2]   2
k \geqslant 2
    =   k \ge 2   k \geq 2   k>=2   [2,\infty)   2 \le k
    ≠   k > 2   k \le 2   2   k=2
(3,4]
    =   (3, 4]   \left(3,4\right]   3 < x \le 4   x \in (3,4]   (3, \frac{8}{2}]
    ≠   [3,4]   (3,4)   [3,4)   (4,3]   3,4   3 \le x \le 4   (3,5]
(-\infty,\infty)
    =   \mathbb{R}   x \in \mathbb{R}
    ≠   [0,\infty)   \emptyset   0
(-\infty, 0]
    =   \left(-\infty,0\right]   x \le 0   (-∞, 0]
    ≠   (-\infty,0)   (\infty, 0]   [0,\infty)   x<0
x \in [-2,7]
    =   [-2,7]   -2 \le x \le 7   x\in[-2, 7]
    ≠   (-2,7)   [-2,7)   -2,7   x \in \{-2,7\}
(-\infty, 2) \cup (3, \infty)
    =   (3,\infty)\cup(-\infty,2)   x<2 \text{ or } x>3   x \in (-\infty,2)\cup(3,\infty)
    ≠   (-\infty, 2] \cup (3, \infty)   (-\infty, 2)   (2,3)   (-\infty, 2) \cup (4, \infty)
[1,5]
    =   [1,3]\cup[2,5]   1 \le x \le 5
    ≠   [1,3]\cup[4,5]   [1,3]\cap[2,5]
(-\infty, 0) \cup\{1\}
    =   \{1\} \cup (-\infty,0)   x<0 \text{ or } x=1
    ≠   (-\infty, 0)   (-\infty, 0]\cup\{1\}   (-\infty,1)

# Tuples, points and columns in order; brackets count where two numbers may be an interval.
\left( 3, \frac{\pi}{2} \right)
    =   (3, \pi/2)   (3,\frac{\pi}{2})   (r,\theta) = (3, \frac{\pi}{2})   \langle 3, \pi/2\rangle
    =   3, \frac{\pi}{2}
    ≠   (\pi/2, 3)   (3, \pi)   [3,\pi/2]   3   \{3, \pi/2\}
(4,3)
    =   (4, 3)   \left(4,3\right)   P = (4,3)   x=4, y=3
    ≠   (3,4)   (5,2)   (4,3,0)   7   43   4.3
(6,31,-1)
    =   (6, 31, -1)   [6,31,-1]   \begin{pmatrix}6\\31\\-1\end{pmatrix}   6,31,-1
    ≠   (31,6,-1)   (6,31,1)   (6,31)   \{6,31,-1\}
(2,251,252)
    =   (2, 251, 252)
    ≠   (2251252)   (2,252,251)   2251252   (2, 251252)
(1,2),(3,4)
    =   (3,4),(1,2)   \{(1,2),(3,4)\}   (1,2) \text{ and } (3,4)   (x,y)=(1,2),(3,4)   (x,y) \in \{(3,4),(1,2)\}
    ≠   (2,1),(3,4)   (1,2)   (1,2),(3,4),(5,6)   (1,3),(2,4)   1,2,3,4   (1,2,3,4)

# Lists and sets in any order, each element at least as often as in the gold.
1,-2
    =   -2, 1   \{1,-2\}   1 \text{ and } -2   1 and -2   x=1, -2   x=1, x=-2   x = 1 \text{ or } x = -2
    =   x \in \{-2, 1\}   1;-2   $1$,$-2$   (1,-2)
    ≠   1   -2   1,2   -1,2   1,-2,3   [1,-2]   1-2   -1
\{1,2,3\}
    =   1,2,3   \{3,2,1\}   \{1, 2, 3\}.   \left\{1,2,3\right\}
    ≠   \{1,2\}   \{1,2,3,4\}   123   6   (1,2,4)
\{5\}
    =   5   x=5   \{5\}
    ≠   6   \{5,6\}   \emptyset
\emptyset
    =   \varnothing   \{\}
    ≠   0   \{0\}
-2,-2
    =   -2, -2   a=-2, b=-2
    ≠   -2   2,-2
16,3,1,1
    =   16, 3, 1, 1   1,1,3,16
    ≠   16,3,1   16,3,3,1   16,3,1,1,2
1,2,3
    =   3, 1, 2
    ≠   1, 2, 3, ...   1,2,3,\ldots   1,2   123
1,-2
    =   1,-2,-2   1,1,-2
    ≠   1,1

# ± is two answers.
1 \pm \sqrt{19}
    =   1+\sqrt{19}, 1-\sqrt{19}   1-\sqrt{19},1+\sqrt{19}   x = 1 ± \sqrt{19}   1\mp\sqrt{19}
    ≠   1 + \sqrt{19}   1 \pm \sqrt{17}   \pm \sqrt{19}   -1 \pm \sqrt{19}
\pm 2
    =   2,-2   x=\pm 2   \{-2, 2\}
    ≠   2   -2   4   \pm 4
\{1\pm\sqrt{5},-2\}
    =   -2, 1+\sqrt5, 1-\sqrt5   \{-2, 1\pm\sqrt{5}\}
    ≠   1\pm\sqrt5   \{1+\sqrt5,-2\}

# Functions.
f(x)=x,f(x)=-x
    =   f(x)=-x, f(x)=x   x, -x   f(x) = x \text{ or } f(x) = -x
    ≠   f(x)=x   f(x)=x, f(x)=x   f(x)=x, f(x)=2x
f(n)=n, g(n)=1
    =   g(n)=1, f(n)=n   f(n)=n,g(n)=1
    ≠   f(n)=1, g(n)=n   f(n)=n

# Matrices.
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}
    =   \begin{bmatrix}1&2\\3&4\end{bmatrix}   \left(\begin{matrix}1&2\\3&4\end{matrix}\right)
    =   \begin{pmatrix}1.0&2\\3&\frac{8}{2}\end{pmatrix}
    ≠   \begin{pmatrix}1&3\\2&4\end{pmatrix}   \begin{pmatrix}1&2\\3&5\end{pmatrix}
    ≠   \begin{vmatrix}1&2\\3&4\end{vmatrix}   -2   1,2,3,4
\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix}
    =   -\begin{pmatrix} 1 & 0 \\ 0 & 1 \end{pmatrix}   \begin{bmatrix} -1 & 0 \\ 0 & -1 \\ \end{bmatrix}
    ≠   \begin{pmatrix} 1 & 0 \\ 0 & 1 \end{pmatrix}   \begin{pmatrix} -1 \\ -1 \end{pmatrix}   -1
\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}
    =   \frac{1}{5}\begin{pmatrix} 1 \\ -18 \end{pmatrix}   \begin{bmatrix} 0.2 \\ -3.6 \\ \end{bmatrix}
    ≠   \begin{pmatrix} -18/5 \\ 1/5 \end{pmatrix}   \left[\frac15, -\frac{18}{5}\right]
\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix}
    =   \begin{pmatrix}-\frac13\\\frac23\\\frac53\end{pmatrix}   \begin{bmatrix} -1/3 \\ 2/3 \\ 5/3 \end{bmatrix}
    =   \left(-\frac13, \frac23, \frac53\right)   \mathbf{v} = \begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix}
    ≠   \begin{pmatrix} 2/3 \\ -1/3 \\ 5/3 \end{pmatrix}   \begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}
    ≠   \begin{pmatrix} -1/3 & 2/3 & 5/3 \end{pmatrix}

# Words: any case and font, but not as products of letters.
\text{east}
    =   east   East   \text{East}   \textbf{east}   \mathrm{east}   \text{the east}   \text{ east }   \text{east}.
    ≠   seat   \text{west}   e   \text{northeast}   5
\text{Evelyn}
    =   Evelyn   \text{evelyn}   \mbox{Evelyn}
    ≠   \text{Angela}   \text{Eve}
\text{no}
    =   no   No   \textbf{No}
    ≠   \text{on}   on   yes   \text{not}
\text{no solution}
    =   \text{No solution}   no solution   \text{No  solution}
    ≠   \text{one solution}   \text{no}   0

# Choices.
\text{(C)}
    =   C   (C)   \text{C}   \textbf{(C)}   \mathrm{(C)}   (\text{C})   \text{(C)}.
    ≠   D   \text{(B)}   3   (B, C)
B
    =   (B)   \text{B}   \textbf{(B)}   B.
    ≠   A   8   \text{(D)}

# Ratios and times.
3:2
    =   3 : 2   \frac{3}{2}   3/2
    ≠   2:3   3   3:2:1
3:2:1
    =   3 : 2 : 1
    ≠   3:1:2   3:2   6:4:2
2:30
    =   2:30   2:30 \text{ p.m.}
    ≠   3:30   230
8 \text{ a.m.}
    =   8\text{ am}   8
    ≠   8\text{ p.m.}   9

# Words that multiply make another number, words that qualify another statement; all others only count.
7
    =   7 \text{ apples}   7 red apples   7 \text{ more apples}   7 \text{ different ways}   7 pairs   7 points
    =   7 of them
    ≠   7 \text{ million}   7 \text{ hundred}   7 thousand people   7 dozen   7 \text{ thirds}   7 \text{ hundredths}
    ≠   7 \text{ and a half}   7 and a half hours   7 half   7 halves   7 \text{ squared}   7 cubed   7 factorial
    ≠   7 \text{ or more}   7 or fewer   7 or so   7 \text{ at least}   7 \text{ at most}   7 minimum   7 and up
    ≠   7 \text{ minus one}   7 plus one   7 point five   7 \text{ times two}   7 \text{ below zero}   7 negative
    ≠   7 \text{ is wrong}   7 \text{ not}   7 \text{ base } 8   7 \text{ repeating}   7 \text{ pi}
    ≠   7 \text{ percent of } 8
    ≠   \text{at most } 7   \text{more than } 7   \text{not } 7   >7   \ge 7   \text{about } 7   7万   7个以上
3 \text{ million}
    =   3000000   3,000,000   3 \times 10^6   3 million dollars   \$3 \text{ million}   3{,}000 \text{ thousand}   300万
    ≠   3   3 \text{ billion}   30000   3 \text{ thousand}   3 \text{ millionths}
7.5
    =   7 \text{ and a half}   7 and a half hours   7\frac12   15 \text{ halves}   7 and two quarters
    ≠   7 \text{ and a third}   7 and a quarter   7
3 \text{ dozen}
    =   36   36 eggs   3 dozen eggs
    ≠   3   30   12
8 \text{ or more}
    =   8 \text{ or more}   8 or more
    ≠   8   8 \text{ or fewer}   9 \text{ or more}

# Units that divide, or that are written without space or abbreviated.
15
    =   15 ml   15 L   15 mph   15 m/s   15 °C   15people   15 ^\circ C   15 \text{ km}/\text{h}
    =   15\ \mathrm{g}/\mathrm{cm}^3
    =   15 km/h   15 \mathrm{~m} / \mathrm{s}^2   15 \text{ miles per hour}   15 men   15 l/min   15 \text{ ft/sec}
    ≠   15 x   15x   15xy   15\mathrm{x}   15\mathbf{x}   15 theta   15 sqrt(2)   15\mathrm{e}   15\mathrm{i}
    ≠   15 \text{ x}
15 \text{ mph}
    =   15   15 miles per hour   15 \text{ mi/h}
    ≠   15 \text{ km/h}   15 m/s   15 \text{ miles}
15 \text{ cm}^2
    =   15   15 \text{ square centimeters}   15 sq cm
    ≠   15 \text{ cm}^3   15 \text{ m}^2   15 \text{ cubic centimeters}
15^\circ\text{C}
    =   15   15°C   15 \text{ degrees Celsius}
    ≠   15^\circ\text{F}   15 \text{ degrees Fahrenheit}

# Money, ordinals, times of day.
45
    =   \$45   45 \$   USD 45   45 USD   \text{\$}45   \text{USD } 45   Rs. 45   ¥45   45€   US\$45   \text{\$45}
    ≠   \$46   \$4.5   \$45 \text{ million}   \$45 \text{ thousand}
\$45
    =   45   45 dollars
    ≠   45 \text{ cents}   4500 \text{ cents}   €45
9
    =   9^{\text{th}}   9th   9\text{th}   9^{th}
    ≠   8^{\text{th}}   9^{t}   9 \text{ tenths}
5:45 \text{ p.m.}
    =   5:45 PM   17:45   05:45 pm   5:45   5:45\text{ pm}
    ≠   5:45 \text{ a.m.}   5:46 PM   6:45 p.m.   5:45:00   545

# What is small, or nearly the same, is compared to its own digits.
\frac{1}{3^{50}}
    =   3^{-50}   \left(\frac13\right)^{50}   \frac{3}{3^{51}}
    ≠   \frac{1}{3^{51}}   \frac{2}{3^{50}}   0   -\frac{1}{3^{50}}   3^{-49}
\frac{1}{25!}
    =   \frac{26}{26!}
    ≠   \frac{1}{24!}   \frac{2}{25!}   0
2+\frac{1}{3^{70}}
    ≠   2   2-\frac{1}{3^{70}}   2+\frac{1}{3^{71}}
\frac{3^{90}+7}{2 \cdot 3^{90}}
    ≠   \frac{7}{2 \cdot 3^{90}}   \frac12   \frac{3^{90}+8}{2 \cdot 3^{90}}
\frac{\sqrt{5}}{10^{18}}
    =   \sqrt{5} \cdot 10^{-18}   2.236068 \times 10^{-18}
    ≠   \frac{\sqrt{7}}{10^{18}}   0   0.0   2.24 \times 10^{-18}
\frac{1}{6000000}
    =   0.000000166667   1.66667 \times 10^{-7}
    ≠   0.0   0.000000   0   0.0000002
\frac{x}{2^{70}}
    =   2^{-70}x
    ≠   \frac{x}{2^{71}}   0   \frac{y}{2^{70}}
\frac17
    =   0.\overline{142857}   0.142857
    ≠   0.\overline{14}   0.14   0.\overline{1}
0.8\overline{3}
    =   \frac56   0.833333
    ≠   0.83   0.8   \frac{83}{100}

# Values with names are compared by name, also where only one side has them.
a=4, b=9
    =   (a,b)=(4,9)   (4,9)   4, 9   b=9, a=4   \begin{cases} a=4 \\ b=9 \end{cases}   a = 4 \text{ and } b = 9
    ≠   (9,4)   9, 4   a=9, b=4   (b,a)=(4,9)   \{4,9\}   a=4   x=4, y=9   a=4, b=9, c=1
(p,q)=(3,8)
    =   p=3, q=8   q=8, p=3   (3,8)   3, 8   (q,p)=(8,3)
    ≠   p=8, q=3   (8,3)   q=3, p=8
(5,1)
    =   x=5, y=1   y=1, x=5
    ≠   y=5, x=1   x=1, y=5
a=2,b=1;a=6,b=5
    =   (2,1),(6,5)   (a,b)=(6,5) \text{ or } (2,1)   (a,b) \in \{(2,1),(6,5)\}   a=6, b=5; a=2, b=1
    ≠   (2,5),(6,1)   (1,2),(5,6)   (2,1)   a=2, b=5; a=6, b=1
x_1=3, x_2=4
    =   x_{1}=3, x_{2}=4   3, 4
    ≠   x_1=4, x_2=3   4, 3

# Primes count; the variable of a function has no name of its own, but must not be another that has a meaning.
g'(x)=3x
    =   g'(x) = 3 x   g^{\prime}(x)=3x   3x
    ≠   g(x)=3x   g''(x)=3x
y''+y
    =   y+y''
    ≠   y'+y   y+y   2y
h(x)=x^2+1
    =   h(t)=t^2+1   x^2+1   h(n) = 1+n^2
    ≠   h(y)=x^2+1   h(t)=t^2-1   h(x)=t^2+1   h'(x)=x^2+1
h(x)=ax
    ≠   h(a)=ax   h(a)=aa
h(3)=7
    =   7
    ≠   h(4)=7
\sum_{k=1}^n k^2
    =   \sum_{i=1}^n i^2   \sum_{j=1}^{n} j^{2}
    ≠   \sum_{i=1}^m i^2   \sum_{i=1}^n k^2   \sum_{i=1}^n i
\pi(A^2-a^2)
    =   \pi A^2 - \pi a^2
    ≠   \pi(a^2-A^2)   0
\angle PQR_{1}=30
    =   30   30^\circ
    ≠   \angle PQR_{2}=30

# The imaginary unit is a number, upright e is e.
4i\sqrt{5}
    =   4\sqrt{5}i   4 \sqrt 5 \cdot i   \sqrt{-80}   i \sqrt{80}   4\mathrm{i}\sqrt{5}
    ≠   -4i\sqrt{5}   4\sqrt{5}   4j\sqrt{5}   80
\frac{1+i}{2}
    =   \frac{1}{1-i}   \frac12+\frac{i}{2}   0.5+0.5i   \frac{1}{\sqrt2}e^{i\pi/4}
    ≠   \frac{1-i}{2}   \frac{1}{1+i}   1   \frac12
-1
    =   i^2   e^{i\pi}   (i)(i)
    ≠   i   i^4   -i
1-\frac{1}{e^2}
    =   1-\mathrm{e}^{-2}   \frac{\mathrm{e}^2-1}{\mathrm{e}^2}   1-\exp(-2)
    ≠   1+\mathrm{e}^{-2}   1-\mathrm{e}^{2}
\tan x
    =   \operatorname{tan} x   tan(x)   \mathrm{tan}\, x
    ≠   \operatorname{sin} x   tan

# Text for symbols, roots without braces, exponents as programs write them.
\frac{2\pi}{3}
    =   2*pi/3   2pi/3   (2/3)*pi
    ≠   2*pi/4   2p/3
6\sqrt{5}
    =   6 sqrt(5)   6\sqrt(5)   6√5   6\sqrt5   6*sqrt(5)   √180
    ≠   6 sqrt(7)   6   30
\sqrt[4]{7}
    =   \sqrt[4]7   7^{1/4}
    ≠   \sqrt[3]7   \sqrt 7
2^{20}
    =   2**20   1048576
    ≠   2*20   2e20
3e-05
    =   0.00003   3 \times 10^{-5}   3e-5
    ≠   0.0003   3   3e   0
4.5e+06
    =   4500000   4.5e6
    ≠   4.5e5   4.5

# Unicode mathematics, full-width signs, Chinese words.
x^{12}
    =   x¹²   𝑥¹²
    ≠   x12   x²
\sqrt{x+3}
    =   √(x+3)
    ≠   √x+3   \sqrt{x}+3
\frac52
    =   2½   ５/２   2.５
    ≠   ½   52
(6,7)
    =   （6，7）   ⟨6, 7⟩
    ≠   （7，6）
6,7
    =   6、7   6和7   6或7   x＝6或x＝7   ｛6，7｝
    ≠   6、8   67
7
    =   7。   ７   x＝7   7元   7人   7个
    ≠   ８   7亿   7½

# Fonts, sizes, marks, alignment.
\frac{11}{4}
    =   \textstyle\frac{11}{4}   {\bf \frac{11}{4}}   \boldsymbol{\frac{11}{4}}   \large \frac{11}{4}
    =   \underline{\frac{11}{4}}
    =   \frac{11}{4} \quad \checkmark   \color{blue}{\frac{11}{4}}   \textcolor{red}{\frac{11}{4}}   \ \frac{11}{4}\
    =   \begin{aligned} x &= \frac{11}{4} \end{aligned}   \begin{align*} x &= \frac{11}{4} \end{align*}   \bm{2.75}
    ≠   \boldsymbol{\frac{11}{3}}   \textcolor{red}{\frac{13}{4}}   \begin{aligned} x &= \frac{11}{3} \end{aligned}
\begin{pmatrix} 2 & 0 \\ 1 & 5 \end{pmatrix}
    =   \begin{pmatrix} 2 & 0 \\[6pt] 1 & 5 \end{pmatrix}   \begin{bmatrix} 2 & 0 \cr 1 & 5 \end{bmatrix}
    =   \left(\begin{array}{cc} 2 & 0 \\ 1 & 5 \end{array}\right)
    =   \left[\begin{smallmatrix} 2&0\\1&5 \end{smallmatrix}\right]
    ≠   \begin{pmatrix} 2 & 1 \\[6pt] 0 & 5 \end{pmatrix}   \begin{pmatrix} 2 & 0 & 1 & 5 \end{pmatrix}

# Choices with what they say, lists with other words between, ratios, bases and residues with names.
C
    =   (C) 12   \text{(C) } x=2   \textbf{(C)}\ 12   C. 12   C) 12   \text{Option C}   \text{The answer is (C)}
    =   \boldsymbol{C}
    ≠   \text{(D) } 12   C \text{ or } D   (C), (D)   (C)(D)   \text{not C}   D. C   CD
4,6,9
    =   4, 6 \text{, and } 9   4, 6, \text{ or } 9   x=4 \lor x=6 \lor x=9   x=4orx=6orx=9
    ≠   4, 6 \text{, and } 8   4 \text{ or } 6
2:9
    =   AB:CD=2:9   S_1:S_2=2:9   2 \text{ to } 9   2 \colon 9
    ≠   9:2   AB:CD=9:2
V_a:V_b=2:9
    =   2:9   \frac{2}{9}
    ≠   9:2   V_b:V_a=2:9
31_5
    =   x = 31_5   31_{\text{five}}   31 \text{ base } 5   31_{five}
    ≠   x = 32_5   31_{\text{six}}   31 \text{ base } 6   16
4 \pmod{9}
    =   4   x \equiv 4 \pmod 9   13 \pmod 9   x \equiv 4 \ (\text{mod } 9)   4 \bmod 9
    ≠   5 \pmod 9   4 \pmod 8   13   x \equiv 4 \pmod{10}
\text{circle}
    =   \text{Circle.}   \text{a circle}
    ≠   \text{ellipse.}

# Cases, conditions, inequalities turned round.
\begin{cases} 2x & x>1 \\ 2 & x\le 1\end{cases}
    =   \begin{cases} 2x, & x>1 \\ 2, & x \leq 1 \end{cases}
    =   \begin{cases} 2 & \text{if } x\le 1 \\ 2x & \text{if } x>1 \end{cases}
    ≠   \begin{cases} 2x & x\ge 1 \\ 2 & x<1 \end{cases}   \begin{cases} 2x & x>1 \\ 3 & x\le 1\end{cases}   2x
f(x)=kx^2
    =   f(x)=kx^2, k \in \mathbb{R}   kx^2 \text{ where } k > 0   f(x)=kx^2 \text{ for all } x
    ≠   f(x)=kx^3, k \in \mathbb{R}   f(x)=kx^2, k=3
n^3
    =   n^3, n \ge 1   n^3 \quad (n \ge 1)   n^3, n \in \mathbb{N}
    ≠   n^2, n \ge 1   n^3, n=2   m^3, m \ge 1
x>4
    =   4<x   4 < x
    ≠   x>4, x \ne 7   4>x   x \ge 4
5
    ≠   x \not= 5   x \ne 5   x != 5   x \ge 5   x >= 5   2x = 5   5 \approx 6   6 \approx 5   5 \quad 6
    ≠   5'   5''   5²   ⁵   5₂   5 \text{ quadrillion}   5 grand   5 elevenths   5 abcd   5^{st}   5 \mod 4   5 \pmod 4
100!
    ≠   100!+1   100!-1
x^2=-1
    =   x^2+1=0
    ≠   x^2=-2   x^2=1
f(x,y)=xy
    =   f(a,b)=ab
    ≠   f(a,b)=a+b   f(a,b)=xy
-1<x\le 6
    =   6 \ge x > -1   (-1,6]
    ≠   6 > x \ge -1   6 \le x < -1

# Brackets: [8] is a list, an integral part or an interval; a set of sets is none of numbers; (3,8) is no set.
8
    =   \{8\}   (8)   \begin{pmatrix}8\end{pmatrix}
    ≠   [8]   \left[8\right]   [8,8]   x=[8]   x \in [8]   \lbrack 8 \rbrack   [5+3]   \{\{8\}\}   8_{max}
    ≠   8\ldots   8\cdots   8...   8.0\ldots   8_{\text{max}}   8^T   8!!   8 \approx   8 \text{ bps}
    ≠   -x=8   x/2=8   \frac{x}{2}=8   1/x=8   x-1=8   8 \text{ give or take}   8 \text{ ppm}   8\text{-ish}
5.5
    ≠   [5.5]
t+1
    ≠   [t+1]   t+1_2
\{3,8\}
    =   3,8   \{8,3\}
    ≠   (3,8)   [3,8]   \{\{3,8\}\}   \{\{3\},\{8\}\}   \{(3,8)\}
x>0
    =   (0,\infty)
    ≠   (0,\infty]
(-\infty,\infty)
    ≠   [-\infty,\infty]
15\text{ m}
    =   15
    ≠   15\text{ m}^2   15\text{ m/s}   15\text{ m2}
15\text{ m}^2
    =   15   15 \text{ m2}   15 \text{ m}²   15 \text{ square meters}
    ≠   15 \text{ m}   15 \text{ m3}
15\text{ m/s}
    ≠   15\text{ m/s}^2

# A letter is another one than its capital: I is no imaginary unit, an index or an exponent T is not dropped.
i
    ≠   I   \mathbf{I}   I_2   i_1   I'   -I
2i+1
    ≠   2I+1   2i_1+1
I
    ≠   i   I'   I_1   -I
I_1
    ≠   I   I_2   i_1
R_1-r
    =   -r+R_{1}
    ≠   R-r   R_1-R   R_2-r
2^T
    =   2^{T}
    ≠   2   T^2
\begin{pmatrix}1&2\\3&4\end{pmatrix}
    =   \begin{pmatrix}1&3\\2&4\end{pmatrix}^T
    ≠   \begin{pmatrix}1&2\\3&4\end{pmatrix}^T
n!!
    ≠   (n!)!   n!   n
k
    =   \text{k}
    ≠   \text{K}

# Choices are also written small, but e and i are numbers.
\text{(D)}
    =   d   (d)   \text{(d)}   d)   d.   option d   \textbf{d}
    ≠   c   (c)   2d   d+1   d^2   d or c   d, c   cd
G
    =   g   (g)
    ≠   h   -g   g'
\text{(E)}
    =   (e)   e)
    ≠   e   e^2   2e
d
    ≠   D   (D)

# Exactly 12 is 12; what is given with \approx is judged by its digits.
12
    =   \text{exactly } 12   \text{exactly 12}   exactly 12   \text{only } 12   \text{a total of } 12
    =   12 \text{ exactly}   \approx 12   x \approx 12
    ≠   \text{exactly } 13   \text{not exactly } 12   \text{exactly } 12 \text{ million}   \text{just under } 12
    ≠   \text{just over } 12   \text{exactly } 12 \text{ or } 13   \text{exactly twice } 12   \approx 12.1
    ≠   \not\approx 12   11.99 \approx 12   \approx 12, 13   \text{about } 12   \text{only if } 12
x=12
    =   \approx 12   x \approx 12
    ≠   y \approx 12   x \approx 11
\frac13
    =   0.333333\ldots   \approx 0.333333
    ≠   0.333\ldots   \approx 0.333   0.333334\ldots
3.14
    =   \approx 3.14
    ≠   3.14\ldots   \pi   \approx \pi   \approx 3.1

# Logarithms to ten, moduli, indices that only count.
\log_{10} 7
    =   \lg 7   \lg(7)   lg 7   \operatorname{lg} 7   \frac{\ln 7}{\ln 10}
    ≠   \ln 7   \log_2 7   \lg 8
(-\infty,-4)\cup(4,\infty)
    =   |x|>4   4<|x|   \lvert x \rvert > 4
    ≠   |x|\ge 4   |x|<4   |x|>5   |x|>-4   |x|\ne 4
x<-4 \text{ or } x>4
    =   |x|>4   4<|x|
    ≠   |y|>4   |x|\ge 4   |x|<4
|x| \le 4
    =   -4 \le x \le 4   4 \ge |x|   [-4,4]
    ≠   -4<x<4   x \le 4   |y| \le 4   -4 \le y \le 4
\sum_{k=1}^n a_k
    =   \sum_{i=1}^n a_i   \sum_{j=1}^{n} a_{j}
    ≠   \sum_{i=1}^n a_k   n a_k   \sum_{i=0}^{n-1} a_i   \sum_{i=1}^n b_i   \sum_{i=1}^n a_{i+1}   \prod_{i=1}^n a_i
\sum_{k=1}^n x_ky_k
    =   \sum_{i=1}^n y_i x_i
    ≠   \sum_{k=1}^n x_k y_i
a_n=2^n
    =   a_k=2^k   2^n
    ≠   a_k=2^n   a_n=2^k   b_k=2^k   a_{n+1}=2^n   a_2=2^n
x_A=5
    ≠   x_B=5
"""


def rows() -> list[tuple[str, list[str], list[str]]]:
    """Each gold of the table with the answers that are right and those that are wrong."""
    found: list[tuple[str, list[str], list[str]]] = []
    for line in TABLE.splitlines():
        if line.startswith("    "):
            sign, *answers = re.split(" {3,}", line.strip())
            found[-1]["=≠".index(sign) + 1].extend(answers)
        elif line and not line.startswith("# "):
            found.append((line, [], []))
    return found


@pytest.mark.parametrize(("gold", "right", "wrong"), [pytest.param(*row, id=row[0]) for row in rows()])
def test_only_answers_that_say_the_same_are_right(gold: str, right: list[str], wrong: list[str]) -> None:
    verdicts = {answer: verified(gold, answer) for answer in right + wrong}
    assert [answer for answer in right if not verdicts[answer]] == []
    assert [answer for answer in wrong if verdicts[answer]] == []
    quick = {answer: plainly_equal(gold, answer) for answer in right + wrong}
    assert [answer for answer in quick if quick[answer] not in (None, verdicts[answer])] == []


def test_the_table_is_large_and_most_of_it_takes_no_math_verify() -> None:
    pairs = [(gold, answer) for gold, right, wrong in rows() for answer in right + wrong]
    assert len(pairs) > 600
    assert sum(plainly_equal(*pair) is None for pair in pairs) < len(pairs) / 2


@pytest.mark.parametrize(("gold", "answer"), [("", ""), ("3", ""), ("", "3"), ("3", " "), ("3", r"\,"), ("3", "$$")])
def test_nothing_is_no_answer(gold: str, answer: str) -> None:
    assert not verified(gold, answer) and not plainly_equal(gold, answer)


def test_every_answer_says_what_it_says_itself() -> None:
    golds = [gold for gold, _, _ in rows()]
    assert all(plainly_equal(gold, gold) and plainly_equal(gold, rf"$\displaystyle {gold}\,$.") for gold in golds)


PIECES = r"""\text{ 5x=1,;()[]{}/<:&$.'!_8^2\\ \{ \} \pmod 5 \text{a} \text{ or } \pm \cup \le \in \approx \%"""
PIECES += r""" \$ \sqrt \forall \begin{cases} \end{cases} \begin{pmatrix} \end{pmatrix} \frac{1}{2} (x,y)= million"""
PIECES += " √ ² ½ 万 A. pm and "


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*PIECES.split(" "), *"5x=,;()[]{}/ "]), max_size=40).map("".join), st.booleans())
@example(r"\begin{cases}\end{cases}", True)
@example(r"(\begin{matrix}\end{matrix})", True)
def test_rules_reach_a_verdict_on_anything(text: str, known: bool) -> None:
    for gold, answer in (("5", text), (text, "5"), (text, text[::-1]), (text, text + text)):
        assert compared(gold, answer, lambda one, other: known) in (True, False)


NESTED = [  # an answer, and whether the quick path may take it for a 5
    ("(" * 90 + "5" + ")" * 90, True),
    (r"\{" * 45 + "5" + r"\}" * 45, False),
    ("(" * 900 + "5" + ")" * 900, None),
    (r"9^{9^{9^{9}}}", None),
    ("1" * 199, False if len("1" * 199) <= 60 else None),
    ("1" * 10_000, None),
    ("(" * 100, None),
    ("{" * 100 + "}" * 100, None),
    (r"\begin{pmatrix}" * 10, None),
    ("5," * 99 + "5", True),
    ("5," * 99 + "6", False),
    ("\x00\ud800", None),
]


@pytest.mark.parametrize(("answer", "verdict"), NESTED)
def test_the_quick_path_is_quick_and_leaves_hostile_answers_to_the_workers(answer: str, verdict: bool | None) -> None:
    assert plainly_equal("5", answer) is verdict


@st.composite
def written(draw: st.DrawFn, value: Fraction) -> str:
    """A number as someone may write it, decimals perhaps rounded."""
    sign, size = "-" if value < 0 else draw(st.sampled_from(["", "", "+"])), abs(value)
    whole, rest = divmod(size, 1)
    k = draw(st.integers(1, 5))
    top, bottom = k * size.numerator, k * size.denominator
    forms = [rf"{sign}\frac{{{top}}}{{{bottom}}}", rf"{sign}\dfrac {{{top}}} {{{bottom}}}", f"{sign}{top}/{bottom}"]
    forms += [f"{sign}{float(round(size, places)):.{places}f}" for places in (2, 6, 8)]
    if rest == 0:
        forms += [f"{sign}{whole}", f"{sign.strip('+')}{whole:,}", f"{sign}{whole}.0"]
    elif whole:
        forms += [rf"{sign}{whole}\frac{{{rest.numerator}}}{{{rest.denominator}}}"]
    return draw(st.sampled_from(forms))


VALUES = st.builds(Fraction, st.integers(-(10**4), 10**4), st.sampled_from([1, 1, 2, 3, 7, 8, 25, 40, 90, 1000]))


@settings(max_examples=400, deadline=None)
@given(st.data(), VALUES, st.sampled_from([Fraction(0), Fraction(0), Fraction(1), Fraction(1, 10**6), Fraction(1, 3)]))
def test_on_numbers_the_quick_path_agrees_with_math_verify(data: st.DataObject, value: Fraction, off: Fraction) -> None:
    gold, answer = data.draw(written(value)), data.draw(written(value + off))
    quick, slow = plainly_equal(gold, answer), math_verified(tidy(gold), tidy(answer))
    assert quick is not None
    if quick != slow:  # it is stricter where both are exact, and math-verify rounds to six places all the same
        values = number(tidy(gold)), number(tidy(answer))
        assert values[0] is not None and values[1] is not None
        assert slow and 0 < abs(values[0] - values[1]) <= Fraction(1, 10**6)
        assert "." in gold + answer


@settings(max_examples=200, deadline=None)
@given(st.data(), VALUES)
def test_a_number_is_read_exactly_whatever_its_form(data: st.DataObject, value: Fraction) -> None:
    text = data.draw(written(value))
    assume("." not in text or (value * 100).denominator == 1)
    assert number(tidy(text)) == value
    assert number(tidy(rf"\text{{{text}}}")) is None


TOO_KIND = [  # gold, answer: what passes although a strict reader would object, since the gold alone does not tell
    ("0.5", r"0.5\%"),
    ("1,2", "b=1, a=2"),
    ("(2,3)", "2, 3"),
]
TOO_STRICT = [  # right, but written as no rule reads it, nor math-verify
    (r"(2,\infty)", r"\{x \mid x > 2\}"),
    ("5", r"\text{The answer is } 5"),
    ("12", r"\text{twelve}"),
    (r"2, \sqrt{3}", r"2, \sqrt{3} \text{ (twice)}"),
]


def test_what_is_known_to_be_judged_amiss() -> None:
    assert [pair for pair in TOO_KIND if not verified(*pair)] == []
    assert [pair for pair in TOO_STRICT if verified(*pair)] == []
